"""How the verbs that Hydra configures are run: its syntax, our configuration, our way of telling errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from addiff_env.storage.paths import configs_folder


def run_hydra(task: Callable[[DictConfig], None], name: str, argv: Sequence[str] | None = None) -> int:
    """Run ``task`` with the configuration ``name`` and Hydra's command line ``argv``; returns the exit status.

    Raises:
        ValueError: the configuration is wrong; and whatever ``task`` raises.
    """
    given, sys.argv = sys.argv, [sys.argv[0], *(sys.argv[1:] if argv is None else argv)]  # where Hydra looks
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra hands errors on instead of printing them and leaving
    try:
        hydra.main(version_base="1.3", config_path=str(configs_folder()), config_name=name)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        override = getattr(error, "override", None)  # of one that cannot be read, whose message may not quote it
        raise ValueError(f"{override}: {error}" if override else str(error)) from error
    finally:
        sys.argv = given
    return 0
