"""``addiff world train``: the recipes of the embedded world's models, in order; a killed one goes on where it was.

addiff world train                                 all of them
addiff world train --work runs/tiny --seed 1       all of them, with what every recipe takes
addiff world train diffusion --steps 8000          one, with its own options as well
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module

from addiff_env.tiny.recipes import FURTHER, RECIPES


def main(argv: Sequence[str] | None = None) -> int:
    """Run one recipe, or all in order until one fails; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in (*RECIPES, *FURTHER):
        return import_module(f"addiff_env.tiny.recipes.{words[0]}").main(words[1:])
    shared = _parse(words)
    for recipe in RECIPES:
        # A process each: what one leaves behind (memory, random state, caches) does not reach the next.
        command = [sys.executable, "-m", "addiff_env.cli", "world", "train", recipe, *shared]
        if status := subprocess.run(command).returncode:
            return status
    return 0


def _parse(words: Sequence[str]) -> list[str]:
    """Check that all recipes take these options; returns them."""
    from addiff_env.tiny.recipes.common import add_shared  # loads PyTorch

    description, _, examples = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="addiff world train",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "recipe", nargs="?", choices=(*RECIPES, *FURTHER), help="one recipe, given first; its own options follow"
    )
    add_shared(parser)
    parser.parse_args(words)
    return list(words)
