"""``report.html``: one self-contained page from a run folder's files; no model is needed.

``addiff report runs/evaluate`` writes it, ``table.tex`` and ``table.csv`` again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.files import RunFolder
from addiff_env.evaluation.metrics.models import model_notes, read_metric_models
from addiff_env.evaluation.metrics.set_results import SetResults, read_set_results
from addiff_env.evaluation.report.exports import latex_table, write_csv, write_set_results_csv, write_verdicts_csv
from addiff_env.evaluation.report.figures import (
    actions_figure,
    plot_quality_against_compute,
    plotted_costs,
    quality_figure,
)
from addiff_env.evaluation.report.gallery import Cards
from addiff_env.evaluation.report.seconds import notes_of, speed_table, speeds_of, timing_notes, write_speeds_csv
from addiff_env.evaluation.report.sections import (
    category_section,
    comparison_tables,
    complexity_table,
    distinct_text,
    judge_tables,
    main_section,
    metric_section,
    set_section,
    speed_section,
    subject_of,
)
from addiff_env.evaluation.report.svg import DARK, css_variable, inline_svg
from addiff_env.evaluation.report.tables import fixed_text
from addiff_env.evaluation.report.text import absences, summary_table
from addiff_env.evaluation.run.run_folder import (
    SETTINGS,
    read_items,
    read_provenance,
    read_trajectories,
    read_verdicts,
    reported_rows,
    usable_timings,
    write_verdicts,
)
from addiff_env.evaluation.statistics.decide import decide
from addiff_env.evaluation.statistics.decision import Decision
from addiff_env.evaluation.statistics.families import agent_runs
from addiff_env.evaluation.statistics.rules import configured_rules, read_rules
from addiff_env.evaluation.statistics.speed import Speed
from addiff_env.evaluation.statistics.summary import by_method, counted, decision_counts, headline_metric
from addiff_env.evaluation.statistics.tiers import by_tier, claims_of, describe_tiers, stated_name
from addiff_env.loading.paths import looked_at
from addiff_env.storage.files import claim, read_text, told_when_full, write_whole
from addiff_env.storage.inputs import flatten
from addiff_env.types import ACTIONS, ResultRow

LEFT_OUT = "left_out"  # in a run's provenance: methods and metrics that were asked for and could not be had
WRITTEN = ("report.html", "table.tex", "table.csv", "table_whole.csv", "verdicts.csv", "speeds.csv")


def write_report(
    folder: Path, rows: Sequence[ResultRow], items: Sequence[Item], verdicts: Sequence[Decision]
) -> list[Path]:
    """Write ``report.html``, ``table.tex`` and ``table.csv`` into a run folder; returns their paths.

    Where protocols or set metrics were measured there is ``table_whole.csv`` as well, where there are verdicts
    ``verdicts.csv``, and where the run was timed ``speeds.csv``.

    Args:
        folder: the run, whose pictures, filmstrips, ``config.yaml``, ``provenance.json``, ``protocols.json``,
            ``set_metrics.json`` and ``judge.json`` are shown where they exist.
        rows: per-image rows of all methods.
        items: the benchmark's items; none of a run that was stopped before it kept them.
        verdicts: of both tiers; none where no agent was evaluated.

    Raises:
        ValueError: no rows, or a row that belongs to no item.
    """
    if not rows:
        raise ValueError(f"no rows to report on in {folder}")
    page, tex, table, further, decided, fast = (folder / name for name in WRITTEN)
    found = Found.read(folder, rows, items)
    whole, models, speeds, caption = found.whole, found.models, found.speeds, _caption(rows, found.provenance)
    write_csv(rows, table, models)
    write_whole(tex, latex_table(rows, caption, whole, verdicts, models, speed_table(rows, speeds), found.timing))
    write_whole(page, render(folder, rows, items, verdicts, found))
    written = [page, tex, table]
    for path, write in (
        (further, partial(write_set_results_csv, whole, models=models) if whole else None),
        (decided, partial(write_verdicts_csv, verdicts) if verdicts else None),
        (fast, partial(write_speeds_csv, speeds) if speeds else None),
    ):
        path.unlink(missing_ok=True)  # of an earlier report
        if write:
            write(path)
            written.append(path)
    return written


@dataclass(frozen=True)
class Found:
    """What a run folder holds beside its rows, as far as the report shows it."""

    whole: SetResults
    models: dict[str, str]
    speeds: list[Speed]
    timing: list[str]
    provenance: dict[str, Any]

    @classmethod
    def read(cls, folder: Path, rows: Sequence[ResultRow], items: Sequence[Item]) -> Found:
        """Of the run in ``folder``, about these rows and items."""
        whole, models = read_set_results(folder, rows, items), read_metric_models(folder)
        return cls(whole, models, speeds_of(folder, rows), timing_notes(folder, rows), read_provenance(folder))


def _caption(rows: Sequence[ResultRow], provenance: Mapping[str, Any]) -> str:
    number, name = len(next(iter(by_method(rows).values()))), provenance.get("benchmark", "benchmark")
    return f"{name}, {counted(number, 'picture')}, {distinct_text(rows, 'backbone')}, {distinct_text(rows, 'dtype')}"


def render(
    folder: Path, rows: Sequence[ResultRow], items: Sequence[Item], verdicts: Sequence[Decision], found: Found
) -> str:
    """The page as text, see `write_report`. Everything read from files is escaped by the template."""
    own = by_method(rows).get(subject_of(rows), [])
    num_requirements = {(item.prompt, item.seed): item.num_requirements for item in items}
    rules = read_rules(folder, headline_metric(rows))
    cards, provenance = Cards(rows, folder), found.provenance
    return _template().render(
        css=Markup(_css()),  # noqa: S704 (ours)
        caption=_caption(rows, provenance),
        benchmark=provenance.get("benchmark", "benchmark"),
        pictures=len({(row.prompt, row.seed) for row in rows}),
        prompts=len({row.prompt for row in rows}),
        metric=headline_metric(rows),
        verdicts=verdicts,
        tiers=[(tier.title, found) for tier, found in by_tier(verdicts)],
        claims={one.hypothesis: claims_of(rules).get(stated_name(one.hypothesis), "") for one in verdicts},
        rules={**asdict(rules), "alpha": f"{100 * rules.alpha:g}", "level": f"{100 * rules.level:g}"},  # in percent
        left_out=provenance.get(LEFT_OUT, []),
        subject=subject_of(rows),
        methods=main_section(rows),
        absences=absences(rows),
        made_by=lambda names: model_notes(names, found.models),
        timing=found.timing,
        speeds=speed_section(rows, found.speeds),
        metrics=metric_section(rows),
        whole=set_section(found.whole),
        comparisons=comparison_tables(rows) if own and len(own) < len(rows) else None,
        judged=judge_tables(folder),
        plots=[inline_svg(quality_figure(rows, [name]), f"quality-{name}") for name in plotted_costs(rows)],
        actions=_actions(own),
        complexity=complexity_table(own, num_requirements) if own and items else None,
        categories=category_section(rows),
        gallery=[cards.trajectory(strip) for strip in read_trajectories(folder)],
        failures=cards.failures() if own else None,
        provenance=_provenance(folder, rows, provenance),
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("addiff_env.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["signed"] = lambda value: f"{value:+.1f}"
    environment.filters["fixed"] = lambda value: fixed_text(value, 3)
    environment.filters["counted"] = counted
    environment.filters["short"] = lambda value: f"{value:.4g}"
    environment.filters["p_value"] = lambda value: (
        "–" if math.isnan(value) else "< 0.0001" if value < 1e-4 else f"{value:.2g}"
    )
    return environment.get_template("report.html.jinja")


def _css() -> str:
    """The style sheet, with the plots' colours for light and for dark pages in front."""
    light, dark = (
        "".join(f"{css_variable(color)}:{value};" for color, value in pairs)
        for pairs in ([(color, color) for color in DARK], DARK.items())
    )
    rules = f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"
    return rules + (Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")


def _actions(own: Sequence[ResultRow]) -> dict[str, Any] | None:
    """What the agent did at its first, second, ... decision: shares of the pictures that came so far."""
    if not any(row.actions for row in own):
        return None
    counts = decision_counts(own)  # (decisions, 3)
    lines = [
        (k, int(line.sum()), [f"{100 * share:.1f}" for share in line / line.sum()]) for k, line in enumerate(counts, 1)
    ]
    return {"svg": inline_svg(actions_figure(own), "actions"), "names": ACTIONS, "lines": lines}


# --------------------------------------------------------------------------- provenance


def _provenance(folder: Path, rows: Sequence[ResultRow], kept: Mapping[str, Any]) -> dict[str, Any]:
    """What is needed to run this again."""
    config = RunFolder(folder).config
    return {
        "kept": [
            (name, str(value))
            for name, value in flatten(kept).items()
            if name.split(".")[0] not in ("methods", LEFT_OUT) and value != {}
        ],
        "settings": SETTINGS,
        "methods": [
            (name, [distinct_text(group, part) for part in SETTINGS]) for name, group in by_method(rows).items()
        ],
        "config": read_text(config) if config.exists() else "",
    }


def decide_again(folder: Path) -> list[Decision]:
    """The verdicts anew from a finished run's rows, by the rules of its ``config.yaml``; kept in ``verdicts.json``.

    Raises:
        FileNotFoundError: the run was stopped before its report, which keeps the items.
        ValueError: as `reported_rows` and `decide`.
    """
    rows, items = reported_rows(folder), read_items(folder)
    if not items:
        raise FileNotFoundError(f"no items.jsonl in {looked_at(folder)}: finish the evaluation first")
    rules = configured_rules(folder, headline_metric(rows))
    complexity = {(item.prompt, item.seed): float(item.num_requirements) for item in items}
    runs = agent_runs(by_method(rows))
    verdicts = decide(rows, complexity, rules, runs, usable_timings(folder, rows)) if runs else []
    write_verdicts(folder, verdicts, rules)
    return verdicts


def main(argv: Sequence[str] | None = None) -> int:
    """Make a finished run's report again; returns the exit status."""
    text = "Make the report of a finished evaluation again, without any model."
    parser = argparse.ArgumentParser(prog="addiff report", description=text)
    parser.add_argument("folder", type=Path, help="run folder of evaluate.py, e.g. runs/evaluate")
    parser.add_argument("--decide", action="store_true", help="decide anew, by the rules in its config.yaml")
    options = parser.parse_args(argv)
    folder = options.folder
    if not RunFolder(folder).rows.exists():
        raise FileNotFoundError(f"no rows.jsonl in {looked_at(folder)}")
    with claim(folder, "the report"), told_when_full(folder):
        for path in remake(folder, options.decide):
            print(path)
    return 0


def remake(folder: Path, decide: bool) -> list[Path]:
    """Table, plot, report and exports of a finished run again; ``decide``: the verdicts, too, which are printed.

    Returns:
        What was written.
    """
    verdicts, files = decide_again(folder) if decide else read_verdicts(folder), RunFolder(folder)
    if decide:
        print(describe_tiers(verdicts))
    rows = reported_rows(folder)
    write_whole(files.table, summary_table(rows, notes_of(folder, rows)) + "\n")
    plot_quality_against_compute(rows, files.plot)
    return [files.table, files.plot, *write_report(folder, rows, read_items(folder), verdicts)]
