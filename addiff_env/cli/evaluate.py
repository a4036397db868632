"""Compare a trained agent with fixed-step inference on held-out prompts."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as Hydra's command line says; returns the exit status."""
    if argv is not None:
        sys.argv[1:] = argv
    runpy.run_path(str(Path(__file__).parents[2] / "evaluate.py"), run_name="__main__")
    return 0
