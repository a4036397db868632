"""Make every number of the README and of docs/results.md anew: an evaluation, then the pages' parts that it makes.

    addiff reproduce                                        the README's methods on the whole of tiny-final
    addiff reproduce --methods prices                       three agents at five prices, and the rules of each
    addiff reproduce --methods all --limit 512              these and every other method, for hours
    addiff reproduce --benchmark tiny-dev --limit 24 --folder runs/small --pages copies/README.md copies/results.md

Rows are kept as they are made, in one folder for all three: after Ctrl-C or a kill the same command goes on. The parts
lie between markers, see `addiff_env.evaluation.report.pages`; they are called ``main``, ``prices`` and ``all``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from addiff_env.evaluation.benchmarks.items import known_benchmarks, load_benchmark
from addiff_env.evaluation.budget_bars import describe_bars
from addiff_env.evaluation.files import RunFolder
from addiff_env.evaluation.prices import Chosen, read_rules
from addiff_env.evaluation.report.pages import Run, check_pages, fill_pages
from addiff_env.evaluation.run import command
from addiff_env.evaluation.statistics.families import at_price
from addiff_env.loading.paths import resolve_model
from addiff_env.stats import at_least_one
from addiff_env.storage.commands import command_line, override
from addiff_env.storage.files import file_name, write_whole

REMARKS = {  # of the methods that stand in the README's table
    "ddim-10": "",
    "ddim-50": "",
    "unipc-20": "another solver",
    "best-of-2:ddim-5": "two pictures, the better by the verifier",
    "two-step:0.2:6:0.65:0.95": "the hand-made rule",
    "agent": "",
}
SEEDS = tuple(f"addiff_env:tiny/weights/agent_prices{seed}" for seed in ("", "_seed1", "_seed2"))  # one group
RULES = "addiff_env:tiny/weights/agent_prices/rules.json"  # of addiff world prices --rules
FIXED = ("ddim-5", "ddim-10", "ddim-20", "ddim-50", "unipc-20", "best-of-2:ddim-5", "best-of-2:ddim-10")
FURTHER = (  # of --methods all
    *("dpmpp_2m-10", "dpmpp_2m-20", "euler-20", "unipc-10"),
    *("best-of-3:ddim-10", "fk-2:ddim-5", "fk-4:ddim-10", "rbf-10:ddim-5", "rbf-40:ddim-10", "restart-15:ddim-10"),
)
BUDGETS, EVERYTHING = "prices", "all"  # names for --methods, and of the pages' parts
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
    add("--methods", nargs="+", default=list(REMARKS), help=f"names, {BUDGETS} or {EVERYTHING} ({', '.join(REMARKS)})")
    add("--folder", type=Path, help=f"where rows are kept ({FOLDER / '<benchmark>'})")
    add("--pages", type=Path, nargs="+", default=PAGES, help=f"pages to fill ({', '.join(map(str, PAGES))})")
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", help="further settings of addiff evaluate")
    args = parser.parse_args(argv)
    args.folder = args.folder or FOLDER / file_name(args.benchmark)
    return args


def part_name(args: argparse.Namespace) -> str:
    """What the pages' parts are called that the asked methods fill."""
    return args.methods[0] if args.methods in ([BUDGETS], [EVERYTHING]) else "main"


def methods_of(name: str, chosen: Chosen) -> list[str]:
    """The agent at every price that rules were ``chosen`` for, the middle one first, the rules, and others."""
    prices = sorted(chosen)
    middle = prices[len(prices) // 2]
    agents = [at_price("agent", price) for price in (middle, *(price for price in prices if price != middle))]
    rules = dict.fromkeys(rule for named in chosen.values() for rule in named.values())
    return [*agents, *rules, *FIXED, *(FURTHER if name == EVERYTHING else ())]


def evaluation(args: argparse.Namespace) -> list[str]:
    """The words of `addiff evaluate` that make the rows."""
    chosen: dict[str, Any] = {"benchmark.name": args.benchmark, "benchmark.limit": args.limit}
    if (name := part_name(args)) == "main":
        chosen["methods"] = args.methods
    else:
        chosen |= {"methods": methods_of(name, read_rules(Path(resolve_model(RULES)))), "agents": SEEDS}
    fixed = {"save_images": False, "hydra.run.dir": args.folder}
    return [*(override(key, value) for key, value in (chosen | fixed).items()), *args.set]


def bars_text(folder: Path) -> str:
    """The bars, or why so few pictures do not tell them: the page's other parts are made all the same."""
    try:
        return describe_bars(folder, Path(resolve_model(RULES)))[0]
    except ValueError as error:
        return f"n/a: {error}"


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and fill the pages; returns the exit status."""
    args = options(argv)
    name = part_name(args)
    check_pages(args.pages, name)
    load_benchmark(args.benchmark)  # an unknown one is refused at once
    if status := command.main(evaluation(args)):
        return status
    if name == BUDGETS:
        write_whole(RunFolder(args.folder).bars, bars_text(args.folder) + "\n")
    remarks = {method: remark for method, remark in REMARKS.items() if remark}
    given = sys.argv[2:] if argv is None else argv
    run = Run(name, args.folder, command_line("addiff", "reproduce", *given), remarks)
    print("wrote\n" + "\n".join(f"  {path}" for path in fill_pages(args.pages, run)))
    return 0
