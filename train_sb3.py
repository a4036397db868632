"""Train a policy with Stable-Baselines3 and save it as a safe agent bundle.

python train_sb3.py                               the embedded world, with configs/train.yaml
python train_sb3.py env=sd15 seed=1               another preset; anything can be overridden
python train_sb3.py algorithm=maskable_ppo prompts=curriculum reward.target_nfe=15
python train_sb3.py --cfg job                     show the configuration without running it

The same command, given again after an interruption, goes on from the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import hydra
import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from addiff_env.sb3.callbacks import Judge
from addiff_env.sb3.training import train
from addiff_env.tiny.checker import judge


def success_share(pictures: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
    """Share of pictures uint8 (B, H, W, 3) that the embedded world's exact checker accepts."""
    verdicts = [judge(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
    return {"success": float(np.mean([verdict.satisfied for verdict in verdicts]))}


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> None:
    """Train, save, say where."""
    run = Path(HydraConfig.get().runtime.output_dir)
    checker: Judge | None = success_share if cfg.env.id.startswith("AdDiffusion-Tiny-") else None
    result = train(cfg, run, checker)
    if result.collapsed:
        print(f"stopped after {result.timesteps} decisions: {result.collapsed}")
    out = cfg.out or run / "agent"
    print(f"agent {result.agent.fingerprint} -> {out}   (TensorBoard: tensorboard --logdir {run})")


if __name__ == "__main__":
    main()
