"""``addiff world train``: the recipes of the embedded world's models, in order; a killed one goes on where it was.

addiff world train                                 all of them
addiff world train --work runs/tiny --seed 1       all of them, with what every recipe takes
addiff world train diffusion --steps 8000          one, with its own options as well

Each recipe needs what those before it made.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module

from addiff_env.storage.commands import described_parser
from addiff_env.tiny.recipes import FURTHER, RECIPES


def main(argv: Sequence[str] | None = None) -> int:
    """Run one recipe, or all in order until one fails; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in (*RECIPES, *FURTHER):
        return import_module(f"addiff_env.tiny.recipes.{words[0]}").main(words[1:])
    _check(words)
    for recipe in RECIPES:
        if status := run_recipe(recipe, *words):
            return status
    return 0


def run_recipe(recipe: str, *options: str) -> int:
    """Run a recipe in a process of its own, whose memory, random state and caches do not reach the next; its status."""
    return subprocess.run([sys.executable, "-m", "addiff_env.cli", "world", "train", recipe, *options]).returncode


def _check(words: Sequence[str]) -> None:
    """Check that these options are for all recipes."""
    from addiff_env.tiny.recipes.common import add_shared  # loads PyTorch

    parser = described_parser("addiff world train", __doc__)
    parser.add_argument(
        "recipe", nargs="?", choices=(*RECIPES, *FURTHER), help="one recipe, given first; its own options follow"
    )
    add_shared(parser)
    if recipe := parser.parse_args(words).recipe:
        parser.error(f"the recipe comes first: addiff world train {recipe} ...")
