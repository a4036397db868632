"""The files of a run folder, by what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def _file(name: str) -> Any:
    return property(lambda self: self.path / name)


class RunFolder:
    """Where an evaluation in ``path`` keeps what; nothing has to be there."""

    rows: Path = _file("rows.jsonl")  # a line per picture
    config: Path = _file("config.yaml")
    methods: Path = _file("methods.json")  # what came of the names asked for
    tuning: Path = _file("tuning.json")  # what the tuned methods stand for
    items: Path = _file("items.jsonl")  # prompt, seed, category and complexity of every picture
    verdicts: Path = _file("verdicts.json")  # H1-H4 with their parts, and the rules that they were reached by
    timings: Path = _file("timings.json")  # seconds of each method, measured in turns on one machine
    provenance: Path = _file("provenance.json")  # benchmark, agent, environment, libraries
    protocols: Path = _file("protocols.json")  # what benchmarks' own protocols say of whole methods
    set_metrics: Path = _file("set_metrics.json")
    trajectories: Path = _file("filmstrips")  # a folder per recorded trajectory
    filmstrips: Path = _file("filmstrips.png")
    plot: Path = _file("quality_vs_compute.png")
    report: Path = _file("report.html")
    table: Path = _file("table.txt")
    bars: Path = _file("bars.txt")  # of an agent for every price, see `addiff_env.evaluation.budget_bars`
    judge_answers: Path = _file("judge-answers.jsonl")
    judgement: Path = _file("judge.json")
    reported: Path = _file(".reported")  # what the latest report was about

    def __init__(self, path: Path) -> None:
        self.path = path
