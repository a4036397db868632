"""Train a policy with RLlib's PPO on Ray and save it as a safe agent bundle.

    addiff train-rllib rllib.num_env_runners=2          the embedded world, with configs/train_rllib.yaml
    addiff train-rllib env=sd15 rllib.num_env_runners=8 algorithm.total_timesteps=100000
    addiff train-rllib --cfg job                        show the configuration without running it

The same command, given again after an interruption, goes on from the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from addiff_env.rllib.training import describe_kept, train
from addiff_env.storage.commands import command_line, interruptible
from addiff_env.storage.hydra_app import run_hydra


def train_agent(cfg: DictConfig) -> None:
    """Train, save, say where."""
    run = Path(HydraConfig.get().runtime.output_dir)
    with interruptible(lambda: describe_kept(run)):
        train(cfg, run)
    if cfg.reward.price_range is not None:
        print(f"what it does at which price: {command_line('addiff', 'agent', 'table', run / 'agent')}")
    print(f"agent -> {run / 'agent'}   (TensorBoard: {command_line('tensorboard', '--logdir', run)})")


def main(argv: Sequence[str] | None = None) -> int:
    """Train as Hydra's command line says; returns the exit status."""
    return run_hydra(train_agent, "train_rllib", argv)
