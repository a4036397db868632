"""Train a policy with Stable-Baselines3 and save it as a safe agent bundle.

    addiff train                                 the embedded world, with configs/train.yaml
    addiff train env=sd15 seed=1                 another preset; anything can be overridden
    addiff train algorithm=maskable_ppo prompts=curriculum reward.target_nfe=15
    addiff train --cfg job                       show the configuration without running it

The same command, given again after an interruption, goes on from the last checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from addiff_env.env.training_settings import env_settings, held_out_prompts
from addiff_env.env.validation import preset_of
from addiff_env.sb3.held_out import MetricFn
from addiff_env.sb3.training import describe_kept, train
from addiff_env.storage.commands import command_line, interruptible
from addiff_env.storage.hydra_app import run_hydra
from addiff_env.tiny.checker import check_picture
from addiff_env.tiny.prompts import parse_caption
from addiff_env.tiny.scenes import SIZE


def success_share(pictures: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
    """Share of pictures uint8 (B, H, W, 3) that the embedded world's exact checker accepts."""
    verdicts = [check_picture(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
    return {"success": float(np.mean([verdict.satisfied for verdict in verdicts]))}


def success_metric(cfg: DictConfig) -> MetricFn | None:
    """The embedded world's checker, where it can judge every held-out picture; says why not before hours of training.

    Other environments have none, and nothing to be said about.
    """
    if not cfg.env.id.startswith("AdDiffusion-Tiny-"):
        return None
    prompts, settings = held_out_prompts(cfg), preset_of(cfg.env.id) | env_settings(cfg)
    if reason := _beyond_the_checker(prompts, settings["height"], settings["width"]):
        warnings.warn(f"held-out pictures are not judged, there will be no held_out/success: {reason}", stacklevel=2)
        return None
    return success_share


def _beyond_the_checker(prompts: Sequence[str], height: int, width: int) -> str | None:
    if prompts and (height, width) != (SIZE, SIZE):
        return f"the checker reads pictures of {SIZE}x{SIZE}, these have {height}x{width}, e.g. of {prompts[0]!r}"
    for prompt in prompts:
        try:
            parse_caption(prompt)
        except ValueError as error:
            return str(error)  # which quotes the prompt
    return None


def train_agent(cfg: DictConfig) -> None:
    """Train, save, say where."""
    run = Path(HydraConfig.get().runtime.output_dir)
    with interruptible(lambda: describe_kept(run), [] if cfg.resume else ["resume=true"]):
        result = train(cfg, run, success_metric(cfg))
    if result.collapsed:
        print(f"stopped after {result.timesteps} decisions: {result.collapsed}")
    out = cfg.out or run / "agent"
    look = command_line("tensorboard", "--logdir", run)
    print(f"agent {result.agent.fingerprint} -> {out}   (TensorBoard: {look})")
    if result.agent.price_range is not None and result.agent.price_table is None:
        print(f"what it does at which price: {command_line('addiff', 'agent', 'table', out)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Train as Hydra's command line says; returns the exit status."""
    return run_hydra(train_agent, "train", argv)
