"""How the verbs that Hydra configures are run: its syntax, our configuration and folders, our way of telling errors."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from addiff_env.loading.paths import configs_folder, expand_home
from addiff_env.storage.files import file_name


def run_hydra(task: Callable[[DictConfig], None], name: str, argv: Sequence[str] | None = None) -> int:
    """Run ``task`` with the configuration ``name`` and Hydra's command line ``argv``; returns the exit status.

    Raises:
        ValueError: the configuration is wrong; and whatever ``task`` raises.
    """
    words = map(expand_home, sys.argv[1:] if argv is None else argv)
    given, sys.argv = sys.argv, [sys.argv[0], *words]  # where Hydra looks
    before = HydraConfig.instance().cfg  # of the process: a caller's next run must not be taken for this one
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra hands errors on instead of printing them and leaving
    try:
        hydra.main(version_base="1.3", config_path=str(configs_folder()), config_name=name)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        override = getattr(error, "override", None)  # of one that cannot be read, whose message may not quote it
        raise ValueError(f"{override}: {error}" if override else str(error)) from error
    finally:
        sys.argv = given
        HydraConfig.instance().cfg = before
    return 0


def sweep_folder(overrides: Sequence[str], excluded: Sequence[str] = ()) -> str:
    """The name of a folder for the job of a sweep that has these overrides, in whatever order: ``seed-0``.

    Other overrides have another name. One that cannot be told from its words alone, or that would be too long, ends
    with a hash.
    """
    chosen = sorted(word for word in overrides if word.partition("=")[0].lstrip("+~") not in excluded)
    words = ["-".join(word.split("=", 1)) for word in chosen]
    text = "_".join(words)
    is_clear = all(map(_WORD.fullmatch, words[:-1])) and all(map(_LAST_WORD.fullmatch, words[-1:]))
    return file_name(text, None if is_clear else "\n".join(chosen)) if chosen else "defaults"


# An underscore also stands between two overrides, and a dash behind every name: only so can they be told apart.
_WORD = re.compile(r"[A-Za-z0-9_.+]+-[A-Za-z0-9.+-]+")
_LAST_WORD = re.compile(r"[A-Za-z0-9_.+]+-[A-Za-z0-9.+-]+(_[A-Za-z0-9.+]+)*")


def _sweep_folder(*lists: ListConfig) -> str:
    return sweep_folder(*(OmegaConf.to_container(words) for words in lists))  # type: ignore[arg-type]


OmegaConf.register_new_resolver("addiff_sweep_folder", _sweep_folder, replace=True)
