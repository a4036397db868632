"""Which environment a command is about, as words in Hydra's syntax: ``env=sd15 num_envs=4 device=cuda``."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

import addiff_env
from addiff_env.env.config import EnvConfig
from addiff_env.env.training_settings import as_mapping
from addiff_env.env.validation import at_least, checked, preset_of
from addiff_env.loading.paths import configs_folder
from addiff_env.storage.files import read_yaml

SYNTAX = """\
settings, as of the other commands:
  env=<name>       a preset of configs/env (default: tiny; also tiny_prices, sd15, sdxl, flux_schnell) or registered id
  num_envs=<n>     lanes; default: the preset's
  <name>=<value>   any setting of the environment, e.g. device=cpu dtype=float32 model=my/folder
"""
_PREFIXES = ("env.kwargs.", "env.")  # how `addiff train` and `addiff evaluate` name the same settings


@dataclass(frozen=True)
class Chosen:
    """An environment: its id, lanes and all its settings, and those of them that differ from the id's own."""

    env_id: str
    num_envs: int
    settings: dict[str, Any]
    overrides: dict[str, Any]

    @property
    def config(self) -> EnvConfig:
        """Its settings, checked; raises as `EnvConfig`."""
        return EnvConfig(**self.settings)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Let a command take the words."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, SYNTAX
    parser.add_argument("settings", nargs="*", metavar="name=value", help="the environment, see below")


def read_chosen(words: Sequence[str]) -> Chosen:
    """The environment of the words.

    Raises:
        ValueError: a word that is no setting or that cannot be read, no such preset or id, or one of another kind.
    """
    given: dict[str, Any] = {}
    for word in words:
        name, value = _read_word(word)
        given[name] = value
    env_id, preset, lanes = _preset(given.pop("env", "tiny"))
    env_id = given.pop("id", env_id)
    lanes = checked("num_envs", given.pop("num_envs", lanes), Annotated[int, at_least(1)])
    known = [field.name for field in fields(EnvConfig)]
    for name in given:
        if name not in known:
            close = ", ".join(difflib.get_close_matches(name, [*known, "env", "num_envs"])) or "env, num_envs, device"
            raise ValueError(f"the environment has no setting {name!r}; close to it: {close}")
    overrides = preset | given
    return Chosen(env_id, lanes, preset_of(env_id) | overrides, overrides)


def _read_word(word: str) -> tuple[str, Any]:
    try:
        (override,) = OverridesParser.create().parse_overrides([word.lstrip("+")])
    except HydraException as error:
        raise ValueError(f"cannot read {word!r}, expected name=value: {error}") from error
    if override.is_sweep_override() or override.is_delete():
        raise ValueError(f"{word!r} names several values, or none: expected name=value")
    name = override.key_or_group
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name, override.value()


def _preset(name: Any) -> tuple[str, dict[str, Any], int]:
    """Id, settings and lanes of a file of ``configs/env``, or of an id."""
    folder = configs_folder() / "env"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name in known:
        preset: Any = read_yaml(folder / f"{name}.yaml")
        return preset.env.id, as_mapping(preset.env.kwargs) | _reward_of(preset), preset.num_envs
    try:
        preset_of(str(name))
    except ValueError as error:
        close = difflib.get_close_matches(str(name), [*known, *addiff_env.PRESETS])
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"env={name}: {hint}expected one of {', '.join(known)}, or an id: {error}") from error
    return str(name), {}, 1


def _reward_of(preset: Any) -> dict[str, Any]:
    """Settings of the environment that a preset has in its group ``reward``: prices, and weights over the id's own."""
    group = as_mapping(preset.reward) if "reward" in preset else {}
    settings = {"price_range": group["price_range"]} if group.get("price_range") else {}
    if weights := group.get("weights"):
        settings["reward"] = {**(preset_of(preset.env.id).get("reward") or {}), **weights}
    return settings
