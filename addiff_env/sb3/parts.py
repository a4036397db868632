"""The parts of a training, made from its configuration (configs/train.yaml): lanes, model, callbacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from stable_baselines3.common.vec_env import VecMonitor

from addiff_env.env.baseline_cache import BaselineCache
from addiff_env.env.prices import read_price_range
from addiff_env.env.reward import check_undiscounted
from addiff_env.env.training_settings import (
    Count,
    NotNegative,
    Share,
    as_mapping,
    check_discount,
    check_numbers,
    env_inputs,
    env_settings,
    held_out_prompts,
)
from addiff_env.env.validation import preset_of
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.loading.paths import looked_at, resolve_model
from addiff_env.sb3.attempts import RecordedVecEnv
from addiff_env.sb3.callbacks import (
    Clock,
    CollapseAlarm,
    EpisodeLog,
    LinearSchedule,
    RunningNormalisation,
    StatefulCallback,
    TargetNFE,
)
from addiff_env.sb3.episodes import PromptOrder, Stage
from addiff_env.sb3.held_out import HeldOut, MetricFn
from addiff_env.sb3.policies import ALGORITHMS
from addiff_env.sb3.vec_env import DenoiseVecEnv, make_lanes, observation_parts
from addiff_env.storage.commands import command_line


def input_settings(cfg: DictConfig) -> dict[str, Any]:
    """The settings of a training that may name files which it depends on, by the names that the configuration has."""
    held_out = cfg.prompts.held_out.source
    looks = bool(held_out and cfg.logging.held_out_every)
    more = {"prompts.held_out.source": held_out if looks else None, "reward.baselines": cfg.reward.baselines}
    return {**env_inputs(cfg), **more, "attempts.folder": cfg.attempts.folder}


def check_settings(cfg: DictConfig) -> None:
    """Before any model is loaded; what depends on the environment is checked with it.

    Raises:
        ValueError: as `check_numbers`, or a target beside a range of prices.
    """
    _check_attempts(cfg)
    check_numbers(
        cfg,
        {
            "reward.target_nfe": float | None,
            "algorithm.gae_lambda_end": Share | None,
            "attempts.number": Count | None,
            "attempts.jitter": NotNegative | None,
        },
    )
    target = cfg.reward.target_nfe
    price_range = (preset_of(cfg.env.id) | env_settings(cfg)).get("price_range")
    if target is not None and read_price_range(price_range) is not None:
        one, many = f"reward.target_nfe={target:g} searches one price", f"reward.price_range={price_range} draws many"
        raise ValueError(f"{one}, {many}: set one of them")


def _check_attempts(cfg: DictConfig) -> None:
    chosen = {"prompts.source": cfg.prompts.source, "prompts.stages": cfg.prompts.stages}
    chosen["reward.baselines"] = cfg.reward.baselines
    folder = cfg.attempts.folder
    if folder is not None and (given := [f"{name}={value}" for name, value in chosen.items() if value]):
        raise ValueError(f"attempts.folder={folder}: its prompts are recorded, so leave out {', '.join(given)}")


def build_env(cfg: DictConfig) -> DenoiseVecEnv:
    """The lanes with their prompt order, curriculum and baselines.

    Raises:
        FileNotFoundError, ValueError: as `load_baselines`, or as `RecordedVecEnv`.
    """
    lanes = make_lanes(cfg.env.id, cfg.num_envs, **env_settings(cfg))
    if cfg.attempts.folder is not None:
        return RecordedVecEnv(
            lanes, resolve_model(cfg.attempts.folder), cfg.attempts.number, cfg.attempts.jitter or 0.0
        )
    baselines = load_baselines(cfg, lanes) if cfg.reward.baselines else None
    stages = [Stage(**stage) for stage in cfg.prompts.stages]
    order = PromptOrder(lanes.prompts, stages, baselines.seeds if baselines else None, lanes.config.price_range)
    return DenoiseVecEnv(lanes, order, baselines)


def load_baselines(cfg: DictConfig, lanes: DiffusionDenoiseVectorEnv) -> BaselineCache:
    """The configured baselines, which must cover every prompt: one without would end the run in the middle.

    Raises:
        FileNotFoundError, ValueError: as `BaselineCache.load`; a discount, or prompts without a baseline: the message
            says how many. Where something is missing, it has the command that scores it.
    """
    check_undiscounted(lanes.reward_config)
    path = Path(resolve_model(cfg.reward.baselines))
    if not path.is_file():
        raise FileNotFoundError(f"no baselines {looked_at(path)}; make them with: {_scoring_command(cfg)}")
    cache = BaselineCache.load(path, lanes)
    missing = cache.missing(lanes.prompts)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(lanes.prompts)} prompts have no baseline in {path}, e.g. {missing[0]!r}; "
            f"add them with: {_scoring_command(cfg, '--steps', str(cache.configuration['steps']))}"
        )
    return cache


def _scoring_command(cfg: DictConfig, *options: str) -> str:
    """What scores every prompt of this configuration, in its own environment."""
    kwargs = {name: value for name, value in env_settings(cfg).items() if name != "reward"}
    environment = ["--env", cfg.env.id, "--kwargs", json.dumps(kwargs)]
    return command_line("addiff", "baselines", cfg.reward.baselines, *environment, *options)


def build_model(cfg: DictConfig, env: DenoiseVecEnv) -> Any:
    """The algorithm (PPO or MaskablePPO) with the custom policy.

    Raises:
        ValueError: an unknown algorithm, or a discount that differs from the reward's.
    """
    options = as_mapping(cfg.algorithm)
    name = options.pop("name")
    if name not in ALGORITHMS:
        raise ValueError(f"unknown algorithm.name {name!r}; known: {', '.join(ALGORITHMS)}")
    check_discount(cfg, env.reward_config.gamma)
    lag = env.num_envs * options["n_steps"] / options.pop("total_timesteps")
    del options["ent_coef_end"], options["gae_lambda_end"]  # `Progress` follows these schedules
    options["learning_rate"] = LinearSchedule(options["learning_rate"], options.pop("learning_rate_end"), lag)
    algorithm, policy = ALGORITHMS[name]
    policy_options = {**as_mapping(cfg.policy), "parts": observation_parts(env.env)}
    return algorithm(policy, VecMonitor(env), policy_kwargs=policy_options, seed=cfg.seed, device=cfg.device, **options)


def build_held_out(cfg: DictConfig, metric: MetricFn | None) -> HeldOut | None:
    """The look at held-out prompts, where the configuration names some."""
    prompts = held_out_prompts(cfg)
    if not prompts:
        return None
    settings = {"batch_size": cfg.num_envs} | env_settings(cfg)  # no more at once than training takes
    lanes = make_lanes(cfg.env.id, len(prompts), **settings | {"max_episode_steps": None})  # to their ends
    return HeldOut(lanes, prompts, cfg.logging.held_out_every, cfg.logging.filmstrips, metric)


def build_callbacks(cfg: DictConfig, env: DenoiseVecEnv, held_out: HeldOut | None) -> dict[str, StatefulCallback]:
    """The callbacks that a checkpoint remembers, by name, in the order they are called."""
    log = EpisodeLog(env.env.config.price_range)
    callbacks: dict[str, StatefulCallback] = {"clock": Clock(), "log": log}
    if cfg.reward.normalisation not in ("fixed", "running"):
        raise ValueError(f"unknown reward.normalisation {cfg.reward.normalisation!r}; known: fixed, running")
    if cfg.reward.normalisation == "running":
        callbacks["normalisation"] = RunningNormalisation(env)
    if cfg.reward.target_nfe is not None:
        callbacks["dual"] = TargetNFE(env, cfg.reward.target_nfe, cfg.reward.dual_rate)
    callbacks["alarm"] = CollapseAlarm(**as_mapping(cfg.alarm))
    return callbacks | ({"held_out": held_out} if held_out else {})
