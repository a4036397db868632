"""What every trainer reads of a configuration (the groups of ``configs/``): environment, reward, prompts, files."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf

from addiff_env.env.prices import read_price_range
from addiff_env.env.prompts import load_prompts
from addiff_env.env.validation import Rule, above, at_least, at_most, below, checked, preset_of
from addiff_env.stats import spread
from addiff_env.storage.inputs import FILE_SETTINGS, differing, flatten

# Settings of the environment that have a place of their own in the configuration.
_ELSEWHERE = {"reward": "reward.weights", "prompts": "prompts.source", "price_range": "reward.price_range"}

Count = Annotated[int, at_least(1)]
NotNegative = Annotated[float, at_least(0)]
Positive = Annotated[float, above(0)]
Share = Annotated[float, at_least(0), at_most(1)]
NUMBERS: dict[str, Any] = {
    "seed": Annotated[int, at_least(0), below(2**32)],  # NumPy's, which training seeds, takes no more
    "num_envs": Count,
    "calibration_steps": Count,
    "algorithm.total_timesteps": Annotated[float, at_least(1)],
    "algorithm.n_steps": Count,
    "algorithm.batch_size": Count,
    "algorithm.n_epochs": Count,
    "algorithm.learning_rate": Positive,
    "algorithm.learning_rate_end": NotNegative,
    "algorithm.gamma": Share,
    "algorithm.gae_lambda": Share,
    "algorithm.clip_range": Positive,
    "algorithm.ent_coef": NotNegative,
    "algorithm.ent_coef_end": NotNegative,
    "algorithm.vf_coef": NotNegative,
    "algorithm.max_grad_norm": Positive,
    "policy.hidden": Count,
    "policy.gains": Mapping | None,
    "policy.action_bias": Annotated[Sequence[float], Rule("of three finite numbers", lambda bias: len(bias) == 3)],
}


def check_numbers(cfg: DictConfig, more: Mapping[str, Any] = MappingProxyType({})) -> None:
    """What can be checked before any model is loaded: `NUMBERS`, and settings that one trainer has ``more``.

    Raises:
        ValueError: a value that is not allowed; the message names the setting and shows the value.
    """
    for name, kind in {**NUMBERS, **more}.items():
        checked(name, OmegaConf.select(cfg, name), kind)
    for bias in cfg.policy.action_bias:
        checked("each of policy.action_bias", bias, float)


def env_settings(cfg: DictConfig) -> dict[str, Any]:
    """The environment's keyword arguments: ``env.kwargs``, prompts, prices, and the reward over the id's own preset.

    Raises:
        ValueError: the reward, prompts or prices are set in ``env.kwargs``, where they would have two truths.
    """
    settings = as_mapping(cfg.env.kwargs)
    for name, instead in _ELSEWHERE.items():
        if settings.get(name) is not None:
            raise ValueError(f"env.kwargs.{name}={settings[name]!r}: set {instead} instead")
    if cfg.prompts.source is not None:
        settings["prompts"] = _prompts(cfg.prompts.source)
    if (prices := read_price_range(cfg.reward.get("price_range"))) is not None:  # earlier releases have none
        settings["price_range"] = list(prices)
    if weights := as_mapping(cfg.reward.weights):
        preset = preset_of(cfg.env.id).get("reward") or {}
        settings["reward"] = {**preset, **weights}
    return settings


def env_inputs(cfg: DictConfig) -> dict[str, Any]:
    """The settings of the environment that may name files, by the names that the configuration has."""
    settings = preset_of(cfg.env.id) | env_settings(cfg)
    named = {f"env.kwargs.{name}": settings.get(name) for name in FILE_SETTINGS}
    prompts = named.pop("env.kwargs.prompts")
    return {**named, "prompts.source": prompts}


def check_discount(cfg: DictConfig, gamma: float) -> None:
    """Shaping needs one discount: ``gamma`` is the environment's reward's.

    Raises:
        ValueError: the algorithm's is another one.
    """
    if cfg.algorithm.gamma != gamma:
        message = "shaping needs one discount: algorithm.gamma is {}, the reward's gamma {}"
        raise ValueError(message.format(cfg.algorithm.gamma, gamma))


def held_out_prompts(cfg: DictConfig) -> list[str]:
    """The prompts that are looked at, from all over their source; none where the configuration looks at nothing."""
    held_out = cfg.prompts.held_out
    if not held_out.source or not cfg.logging.held_out_every:
        return []
    return spread(load_prompts(_prompts(held_out.source)), held_out.number)


def _prompts(source: Any) -> str | list[str]:
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else list(source)


def as_mapping(cfg: DictConfig) -> dict[str, Any]:
    """A group of the configuration as a plain dictionary, everything filled in."""
    return {str(name): value for name, value in OmegaConf.to_container(cfg, resolve=True).items()}  # type: ignore[union-attr]


def resolved(cfg: DictConfig) -> str:
    """The configuration as YAML, everything filled in."""
    return OmegaConf.to_yaml(cfg, resolve=True)


def differing_values(
    ours: DictConfig,
    theirs: DictConfig,
    contents_now: Mapping[str, str] = MappingProxyType({}),
    contents_there: Mapping[str, str] = MappingProxyType({}),
    named: Mapping[str, Any] = MappingProxyType({}),
    cosmetic: Collection[str] = (),
) -> list[str]:
    """Every value in which two configurations differ, in words; see `addiff_env.storage.inputs.differing`.

    Args:
        ours: one of them.
        theirs: the other one.
        contents_now: fingerprints of the files that ours names.
        contents_there: the same of theirs.
        named: what the message shows of a setting that is not among ours.
        cosmetic: settings and groups that may differ, as they decide no result: ``logging``, ``rllib.nodes``.
    """
    mine, others = (_decisive(cfg, cosmetic) for cfg in (ours, theirs))
    return differing(mine, others, contents_now, contents_there, named)


def _decisive(cfg: DictConfig, cosmetic: Collection[str]) -> dict[str, Any]:
    flat = flatten(as_mapping(cfg))
    return {name: value for name, value in flat.items() if name not in cosmetic and name.split(".")[0] not in cosmetic}
