"""Train a policy with Stable-Baselines3 PPO and save it as a safe agent bundle.

python train_sb3.py                       the embedded world, with configs/train.yaml
python train_sb3.py seed=1 num_envs=16    anything can be overridden
python train_sb3.py --cfg job             show the configuration without running it
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from stable_baselines3 import PPO
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecMonitor

from addiff_env.agent import Agent
from addiff_env.sb3 import DenoisePolicy, DenoiseVecEnv, EpisodeLog, calibrate, make_vec_env, observation_parts

CALIBRATION_SHARES = (0.8, 0.08, 0.12)  # continue, stop, refine


def build_model(cfg: DictConfig, env: DenoiseVecEnv) -> PPO:
    """PPO with the custom policy, its observation statistics calibrated."""
    algorithm = dict(OmegaConf.to_container(cfg.algorithm))  # type: ignore[arg-type]
    algorithm.pop("total_timesteps")
    rate = algorithm.pop("learning_rate")
    policy = dict(OmegaConf.to_container(cfg.policy)) | {"parts": observation_parts(env.env)}  # type: ignore[arg-type]
    model = PPO(
        DenoisePolicy,
        VecMonitor(env),
        policy_kwargs=policy,
        learning_rate=lambda remaining: rate * remaining,
        seed=cfg.seed,
        device="cpu",
        **algorithm,
    )
    calibrate(model, cfg.calibration_steps, CALIBRATION_SHARES, cfg.seed)
    return model


def bundle(cfg: DictConfig, model: PPO, env: DenoiseVecEnv, log: EpisodeLog, seconds: float) -> Agent:
    """The trained actor with what it was trained on and how it did in the last rollout."""
    config: dict[str, Any] = {
        "env": OmegaConf.to_container(cfg.env),
        "observation": observation_parts(env.env),
        "hidden": cfg.policy.hidden,
        "backbone": {"model": env.env.config.model, "dtype": env.env.backbone.dtype_name},
        "reward": vars(env.env.reward_config),
        "training": {
            "seed": cfg.seed,
            "timesteps": model.num_timesteps,
            "seconds": round(seconds, 1),
            "algorithm": OmegaConf.to_container(cfg.algorithm),
            "last_rollout": {name: round(value, 4) for name, value in log.summary.items()},
        },
    }
    return Agent(model.policy.export(), config)


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> None:
    """Train, save, say where."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    set_random_seed(cfg.seed)
    run = Path(HydraConfig.get().runtime.output_dir)
    env = make_vec_env(cfg.env.id, cfg.num_envs, **OmegaConf.to_container(cfg.env.kwargs))  # type: ignore[arg-type]
    model = build_model(cfg, env)
    model.set_logger(configure(str(run), ["stdout", "csv", "tensorboard"]))
    log, started = EpisodeLog(), time.monotonic()
    model.learn(cfg.algorithm.total_timesteps, callback=log, progress_bar=cfg.progress_bar)
    agent = bundle(cfg, model, env, log, time.monotonic() - started)
    out = Path(cfg.out) if cfg.out else run / "agent"
    agent.save(out)
    print(f"agent {agent.fingerprint} -> {out}   (TensorBoard: tensorboard --logdir {run})")


if __name__ == "__main__":
    main()
