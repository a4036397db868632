"""Measure the pipeline's speed: figures are ratios to a baseline of the same process, measured in turns with it.

    addiff bench                                     everything, of the embedded world: some eleven minutes on two cores
    addiff bench --only diffusers batching --rounds 3 --prompts 32
    addiff bench env=sd15 device=cuda dtype=bfloat16 --variant 'height=1024 width=1024' --variant compile=true

A round times each side once, in alternating order; shown are the median of the rounds and their extremes. Ctrl-C ends
it with what was measured by then.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from addiff_env.cli.bench import pictures, quality, steps
from addiff_env.cli.bench.rounds import Figure, table
from addiff_env.cli.bench.subject import AGENT, Subject
from addiff_env.cli.chosen import Chosen, add_settings, read_chosen
from addiff_env.evaluation.run.machine import load_average, machine, today
from addiff_env.stats import at_least_one
from addiff_env.storage.commands import INTERRUPTED
from addiff_env.storage.files import write_whole

COMPARISONS = ("diffusers", "mixed", "batched", "batching", "shares", "scaling", "quality")
LANES = 16  # at most, unless they are named
FAILURES = (RuntimeError, ValueError, TypeError, OSError, ImportError, MemoryError)  # of a comparison; others go on
Comparison = Callable[[Subject], Iterable[Figure]]


def comparisons(options: argparse.Namespace) -> dict[str, Comparison]:
    """Every comparison by its name."""
    return {
        "diffusers": steps.diffusers,
        "mixed": steps.mixed,
        "batched": steps.batched,
        "batching": pictures.batching,
        "shares": steps.shares,
        "scaling": partial(pictures.scaling, lanes=options.scaling_lanes, prompts=options.scaling_prompts),
        "quality": partial(quality.equal_quality, number=options.quality_pictures, folder=options.run),
    }


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(prog="addiff bench", description=(__doc__ or "").split("\n")[0])
    add_settings(made)
    made.add_argument("--only", nargs="+", choices=COMPARISONS, help="of the comparisons; default: all that apply")
    made.add_argument(
        "--variant", action="append", default=[], metavar="'NAME=VALUE ...'", help="measure these settings, too"
    )
    made.add_argument("--agent", metavar="FOLDER", help=f"default: {AGENT} where it fits, else one that stops by turns")
    made.add_argument("--price", type=float, metavar="P", help="of an evaluation; default: the middle of its range")
    made.add_argument("--rounds", type=at_least_one, default=5, metavar="N", help="times that each side is measured")
    made.add_argument("--prompts", type=at_least_one, default=128, metavar="N", help="pictures of batching")
    sizes: dict[str, Any] = {"type": at_least_one, "nargs": "*", "metavar": "N"}
    made.add_argument("--scaling-lanes", default=[1, 4, 64], help="of scaling, beside the baseline's 16", **sizes)
    made.add_argument("--scaling-prompts", default=[16, 256, 1024], help="likewise, beside its 64", **sizes)
    made.add_argument("--quality-pictures", type=at_least_one, default=64, metavar="N", help="of each method")
    made.add_argument("--run", type=Path, metavar="FOLDER", help="a finished evaluation: its quality, of its methods")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write everything there, as it is measured")
    return made


def chosen_variants(words: Sequence[str], variants: Sequence[str]) -> list[Chosen]:
    """The settings, and each variant of them; raises as `read_chosen`."""
    everything = [[*words], *([*words, *shlex.split(variant)] for variant in variants)]
    return [_with_lanes(read_chosen(part), part) for part in everything]


def _with_lanes(chosen: Chosen, words: Sequence[str]) -> Chosen:
    """A preset's lanes are those of a training: here no more than `LANES`."""
    if any(word.lstrip("+").removeprefix("env.").startswith("num_envs=") for word in words):
        return chosen
    return Chosen(chosen.env_id, min(LANES, chosen.num_envs), chosen.settings, chosen.overrides)


class Report:
    """What was measured of one set of settings, shown and written down as it comes."""

    def __init__(self, subject: Subject) -> None:
        config, agent = subject.looking.config, subject.agent
        self.subject, self.figures, self.failed = subject, list[Figure](), dict[str, str]()
        self.date, self.load = today(), [load_average()]
        self.settings = {
            "id": subject.chosen.env_id,
            "lanes": subject.lanes,
            "settings": subject.chosen.overrides,
            "dtype": subject.looking.backbone.dtype_name,
            "size": [config.height, config.width],
            "compile": config.compile,
            "agent": agent.fingerprint if subject.trained else type(agent).__name__,
            "price": subject.price,
        }

    def measure(self, name: str, compare: Comparison) -> bool:
        """Keep a comparison's figures, or why there are none; False: Ctrl-C was pressed."""
        try:
            for figure in compare(self.subject):
                self.figures.append(figure)
        except KeyboardInterrupt:
            return False
        except FAILURES as error:
            self.failed[name] = " ".join(f"{type(error).__name__}: {error}".split())
        return not self.subject.rounds.interrupted

    def text(self) -> str:
        """A line for each figure, and for what failed."""
        of = ", ".join(f"{name} {value}" for name, value in self.settings.items() if name != "settings")
        lines = [f"{name:<10}  failed: {reason}" for name, reason in self.failed.items()]
        return "\n".join([of, f"settings {json.dumps(self.settings['settings'])}", "", table(self.figures), *lines])

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a file."""
        figures = [asdict(figure) for figure in self.figures]
        measured = {"figures": figures, "seconds": self.subject.seconds, "failed": self.failed}
        return self.settings | {"date": self.date, "load_average": [*self.load, load_average()]} | measured


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 1 if a comparison failed, 130 after Ctrl-C."""
    options = parser().parse_intermixed_args(argv)
    if options.json:
        options.json.touch()  # a place that cannot be written to is refused before anything is measured
    if options.run:
        quality.families_of(quality.evaluated(options.run))  # likewise: it is read after minutes of measuring
    reports: list[Report] = []
    going = True
    for chosen in chosen_variants(options.settings, options.variant):
        if going:
            reports.append(Report(Subject(chosen, options.rounds, options.prompts, options.agent, options.price)))
            going = _measure(reports, options)
            print(reports[-1].text() + "\n", flush=True)
    if not going:
        print("addiff bench: interrupted; this is what was measured", file=sys.stderr)
        return INTERRUPTED
    return int(any(report.failed for report in reports))


def _measure(reports: Sequence[Report], options: argparse.Namespace) -> bool:
    """Measure the latest of the ``reports``, writing all of them after each comparison; False: Ctrl-C."""
    report, offered = reports[-1], comparisons(options)
    if len(reports) == 1:
        print(f"{report.date}, load average {report.load[0]}; {machine(report.subject.rounds.device)}\n", flush=True)
    going = True
    for name in options.only or [name for name in COMPARISONS if name != "quality" or report.subject.trained]:
        going = going and report.measure(name, offered[name])
        if options.json:
            facts = {"machine": machine(report.subject.rounds.device), "rounds": options.rounds}
            facts |= {"prompts": options.prompts, "runs": [each.as_dict() for each in reports]}
            write_whole(options.json, json.dumps(facts, indent=2) + "\n")
    return going
