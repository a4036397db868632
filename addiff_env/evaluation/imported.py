"""``addiff import``: bring an official evaluation script's results back into a run, as a metric.

addiff import runs/mine pictures/agent/results.jsonl
addiff report runs/mine
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from addiff_env.evaluation.exchange import bring_back


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    text = "Add the results of an official evaluation script, run on an export, to a run's rows."
    parser = argparse.ArgumentParser(prog="addiff import", description=text)
    parser.add_argument("run", type=Path, help="run folder of evaluate.py that was exported")
    parser.add_argument("scores", type=Path, help="the script's results, below the export")
    parser.add_argument("--metric", help="name of the score (default: the layout's own, ending in _official)")
    parser.add_argument("--replace", action="store_true", help="overwrite scores of the same name")
    told = parser.parse_args(argv)
    names, number = bring_back(told.run, told.scores, told.metric, told.replace)
    print(f"{', '.join(names)} of {number:,} pictures; addiff report {told.run} shows them")
    return 0
