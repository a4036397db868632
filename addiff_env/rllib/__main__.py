"""The command line; see the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from addiff_env.rllib.settings import Settings
from addiff_env.rllib.training import check_numbers, describe_kept, require_ray, train, wait_for_nodes
from addiff_env.storage.commands import interruptible, json_argument


def build_parser() -> argparse.ArgumentParser:
    """The options; every one that is a field of `Settings` has its default."""
    parser = argparse.ArgumentParser(prog="addiff train-rllib", description="PPO by RLlib on Ray.")
    parser.add_argument("folder", type=Path, help="agent, checkpoint and progress; the same folder goes on")
    parser.add_argument("--env", dest="env_id", default=Settings.env_id, help="environment id")
    settings = 'environment settings as JSON, e.g. \'{"mask": "full"}\''
    parser.add_argument("--kwargs", dest="env_kwargs", type=json_argument, default={}, help=settings)
    for knob in fields(Settings)[2:]:
        _add(parser, knob.name, knob.default, knob.metadata["help"], knob.metadata["read"])
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--checkpoint-every", type=int, default=5, help="iterations")
    parser.add_argument("--address", default=None, help="a running Ray ('auto' or host:port); without one, a local Ray")
    parser.add_argument("--nodes", type=int, default=1, help="nodes to wait for")
    return parser


def _add(
    parser: argparse.ArgumentParser, name: str, default: Any, text: str, read: Callable[[str], Any] | None
) -> None:
    kind: dict[str, Any] = {"type": read or (float if default is None else type(default))}
    if isinstance(default, tuple):
        kind = {"type": float, "nargs": len(default)}
    elif default is not None:
        text += " (default: %(default)s)"
    parser.add_argument("--" + name.replace("_", "-"), default=default, help=text, **kind)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the options say; returns the exit status."""
    options = build_parser().parse_args(argv)
    settings = Settings(**{knob.name: getattr(options, knob.name) for knob in fields(Settings)})
    check_numbers(options.iterations, options.checkpoint_every)
    ray = require_ray()  # says what is missing before anything is started
    ray.init(address=options.address)
    try:
        wait_for_nodes(options.nodes)
        with interruptible(lambda: describe_kept(options.folder)):
            train(settings, options.folder, options.iterations, options.checkpoint_every)
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
