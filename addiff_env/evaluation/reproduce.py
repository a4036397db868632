"""Make every number of the README and of docs/results.md anew: one evaluation, then the pages' parts that it makes.

    addiff reproduce                                        the README's methods on the whole of tiny-final
    addiff reproduce --methods all                          every method, for hours
    addiff reproduce --benchmark tiny-dev --limit 24 --folder runs/small --pages copies/README.md copies/results.md

Rows are kept as they are made: after Ctrl-C or a kill the same command goes on. The parts lie between markers, see
`addiff_env.evaluation.report.pages`; those of ``--methods all`` are called ``all``, the others ``main``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from addiff_env.evaluation.benchmarks.items import known_benchmarks, load_benchmark
from addiff_env.evaluation.report.pages import Run, check_pages, fill_pages
from addiff_env.evaluation.run import command
from addiff_env.evaluation.run.planning import ALL
from addiff_env.stats import at_least_one
from addiff_env.storage.commands import command_line, override
from addiff_env.storage.files import file_name

REMARKS = {  # of the methods that stand in the README's table
    "ddim-10": "",
    "ddim-50": "",
    "unipc-20": "another solver",
    "best-of-2:ddim-5": "two pictures, the better by the reward model",
    "threshold:5:0.055": "the hand-made rule",
    "agent": "",
}
BENCHMARK = "tiny-final"
FOLDER = Path("runs", "reproduce")  # with one of its own for each benchmark
PAGES = (Path("README.md"), Path("docs", "results.md"))


def limit(text: str) -> int | None:
    """A number of prompts, or ``null`` for all of them; for ``type=`` of `argparse`."""
    return None if text == "null" else at_least_one(text)


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """What the command line says."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="addiff reproduce", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--benchmark", default=BENCHMARK, help=f"prompts: {', '.join(known_benchmarks()[:3])}, ... ({BENCHMARK})")
    add("--limit", type=limit, help="prompts, categories in turn; null: all (null)")
    add("--methods", nargs="+", default=list(REMARKS), help=f"methods; {ALL}: all there are ({', '.join(REMARKS)})")
    add("--folder", type=Path, help=f"where rows are kept ({FOLDER / '<benchmark>'})")
    add("--pages", type=Path, nargs="+", default=PAGES, help=f"pages to fill ({', '.join(map(str, PAGES))})")
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", help="further settings of addiff evaluate")
    args = parser.parse_args(argv)
    args.folder = args.folder or FOLDER / file_name(args.benchmark)
    return args


def evaluation(args: argparse.Namespace) -> list[str]:
    """The words of `addiff evaluate` that make the rows."""
    methods = ALL if args.methods == [ALL] else args.methods
    chosen = {"methods": methods, "benchmark.name": args.benchmark, "benchmark.limit": args.limit}
    fixed = {"save_images": False, "hydra.run.dir": args.folder}
    return [*(override(name, value) for name, value in (chosen | fixed).items()), *args.set]


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and fill the pages; returns the exit status."""
    args = options(argv)
    name = "all" if args.methods == [ALL] else "main"
    check_pages(args.pages, name)
    load_benchmark(args.benchmark)  # an unknown one is refused at once
    if status := command.main(evaluation(args)):
        return status
    remarks = {method: remark for method, remark in REMARKS.items() if remark}
    given = sys.argv[2:] if argv is None else argv
    run = Run(name, args.folder, command_line("addiff", "reproduce", *given), remarks)
    print("wrote\n" + "\n".join(f"  {path}" for path in fill_pages(args.pages, run)))
    return 0
