"""Options that several verbs take: which agent, on which environment."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

_SETTINGS = ("model", "dtype", "device", "height", "width")  # of the environment


def add_agent_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Let a command take an agent and settings of its environment; `overrides_of` reads the latter."""
    parser.add_argument("--agent", default=default, help="folder or Hub id (default: the shipped one)")
    parser.add_argument("--env", metavar="ID", help="environment, if not the agent's own")
    parser.add_argument("--model", help="Hub id or folder of a diffusers pipeline")
    for name, kind in (("dtype", str), ("device", str), ("height", int), ("width", int)):
        parser.add_argument(f"--{name}", type=kind, help="setting of the environment")


def number_in(low: float, high: float, kind: type[float] = int) -> Callable[[str], Any]:
    """What reads a number of this ``kind`` from ``low`` to ``high``; for ``type=`` of `argparse`."""

    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what} from {low} to {high}, got {text!r}")
        return number

    return read


def overrides_of(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of the environment that were given."""
    return {name: value for name in _SETTINGS if (value := getattr(options, name)) is not None}
