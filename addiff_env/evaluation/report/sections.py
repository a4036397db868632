"""The numbers of the page: tables of rows, comparisons and judges as the template takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from addiff_env.evaluation.files import RunFolder
from addiff_env.evaluation.metrics.set_results import SetResults
from addiff_env.evaluation.report.figures import complexity_figure
from addiff_env.evaluation.report.seconds import speed_table
from addiff_env.evaluation.report.svg import inline_svg
from addiff_env.evaluation.report.tables import (
    HTML,
    Cell,
    Entry,
    Table,
    category_tables,
    method_table,
    metric_table,
    protocol_table,
    score_cell,
    set_table,
)
from addiff_env.evaluation.statistics.comparisons import compare_methods
from addiff_env.evaluation.statistics.families import agent_runs
from addiff_env.evaluation.statistics.hypotheses import LEAST_PROMPTS
from addiff_env.evaluation.statistics.pairing import on_common_pictures
from addiff_env.evaluation.statistics.speed import Speed
from addiff_env.evaluation.statistics.summary import (
    NOT_AVAILABLE,
    by_method,
    by_num_requirements,
    categories_of,
    estimate_of,
    headline_metric,
    measured_costs,
    metric_names,
    score_value,
    scores_of,
    share_metrics,
)
from addiff_env.evaluation.vlm_judge.pairs import OUTCOMES
from addiff_env.storage.files import read_json
from addiff_env.types import ResultRow, SampleKey

SUBJECT = "agent"  # whose comparisons are shown, all its training runs together; decisions and failures: the first's


def distinct_text(rows: Sequence[ResultRow], name: str) -> str:
    """What the rows' field holds, each value once."""
    return ", ".join(dict.fromkeys(str(getattr(row, name)) for row in rows))


def subject_of(rows: Sequence[ResultRow]) -> str:
    """The agent's first training run among the methods; `SUBJECT` where there is none."""
    return next(iter(agent_runs(by_method(rows))), SUBJECT)


# --------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Shown:
    """An entry of a table as the page shows it."""

    mean: str
    interval: str = ""
    note: str = ""
    level: float | None = None


def shown(entry: Entry, missing: str | None = None) -> Shown:
    """An entry as text; ``missing``, by default a dash, where there is nothing to say."""
    text = HTML.value(entry, missing)
    return Shown(text, HTML.interval(entry, ""), entry.note, entry.level) if isinstance(entry, Cell) else Shown(text)


def _lines(table: Table, missing: str | None = None) -> list[tuple[str, list[Shown]]]:
    return [(method, [shown(entry, missing) for entry in entries]) for method, entries in table.lines]


def main_section(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """The main table: quality, costs and actions of each method."""
    metric, costs = headline_metric(rows), measured_costs(rows)
    lines = _lines(method_table(rows, metric, costs))
    return {"costs": [cost.label for cost in costs], "lines": lines, "percent": metric in share_metrics(rows)}


def metric_section(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """Every per-image metric of every method."""
    table = metric_table(rows, metric_names(rows))
    return {"names": table.columns, "scores": metric_names(rows), "lines": _lines(table)}


def set_section(whole: SetResults) -> dict[str, Any] | None:
    """Protocols and set metrics; None where there are none."""
    if not whole:
        return None
    protocols = [(metric, protocol_table(whole, metric)) for metric in whole.protocols]
    tables: list[dict[str, Any]] = [
        {
            "title": f"{metric}, by its own protocol",
            "scores": [metric],
            "names": table.columns,
            "lines": _lines(table, NOT_AVAILABLE),
        }
        for metric, table in protocols
    ]
    if whole.sets:
        table = set_table(whole)
        lines = [
            (method, [Shown(f"{whole.sets[method]['pictures']:,}"), *cells])
            for method, cells in _lines(table, NOT_AVAILABLE)
        ]
        tables.append({"title": "set metrics", "scores": [], "names": ["pictures", *table.columns], "lines": lines})
    return {"tables": tables, "references": list(whole.references.items()), "notes": whole.notes}


def speed_section(rows: Sequence[ResultRow], speeds: Sequence[Speed]) -> dict[str, Any] | None:
    """Pictures a second at equal quality; None where nothing was timed."""
    table = speed_table(rows, speeds)
    return {"names": table.columns, "lines": _lines(table)} if table.lines else None


def category_section(rows: Sequence[ResultRow]) -> list[dict[str, Any]]:
    """One table per metric, methods by categories; the headline metric first."""
    shares, headline = share_metrics(rows), headline_metric(rows)
    names = sorted(metric_names(rows), key=lambda name: name != headline)
    pictures = [len({(row.prompt, row.seed) for row in rows if row.category == name}) for name in categories_of(rows)]
    return [
        {
            "metric": name + " (%)" * (name in shares),
            "score": name,
            "categories": list(zip(table.columns, pictures, strict=True)),
            "lines": _lines(table),
        }
        for name, table in zip(names, category_tables(rows, names), strict=True)
    ]


def comparison_tables(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """The agent's training runs against every other method, for each metric that all rows have; corrected together.

    Pictures that one of the methods lacks are left out, and so are methods and metrics without any; ``notes`` say so.
    """
    metric, runs = headline_metric(rows), agent_runs(by_method(rows))
    measured = [row for row in rows if score_value(row, metric) is not None]
    methods = list(by_method(measured))
    runs, others = [name for name in methods if name in runs], [name for name in methods if name not in runs]
    paired, notes = on_common_pictures(measured, methods)
    lacking = [name for name in by_method(rows) if name not in methods]
    notes += [f"{name} has no {metric}" for name in lacking]
    prompts = len({row.prompt for row in paired})
    if not runs or not others:
        return {"tables": [], "notes": [*notes, f"{'no other method' if runs else 'no agent'} has {metric}"]}
    if prompts < 2:
        return {"tables": [], "notes": [*notes, f"a comparison needs two prompts, got {prompts}"]}
    metrics = [name for name in metric_names(paired) if all(name in scores_of(row) for row in paired)]
    notes += [f"{name} is missing in some rows" for name in metric_names(paired) if name not in metrics]
    found = compare_methods(paired, {SUBJECT: runs}, others, metrics)
    if prompts < LEAST_PROMPTS:  # as for verdicts: a bootstrap of so few says nothing
        nan = math.nan
        found = [replace(one, low=nan, high=nan, p_bootstrap=nan, p_holm=nan, minimum_detectable=nan) for one in found]
        notes.append(f"intervals and p-values need {LEAST_PROMPTS} prompts, got {prompts}")
    return {"tables": [(name, [one for one in found if one.metric == name]) for name in metrics], "notes": notes}


def complexity_table(own: Sequence[ResultRow], num_requirements: Mapping[SampleKey, int]) -> dict[str, Any]:
    """NFE and quality by how much the pictures must get right."""
    metric = headline_metric(own)
    is_share = metric in share_metrics(own)
    lines = []
    for level, group in by_num_requirements(own, num_requirements).items():
        spent = shown(score_cell(estimate_of(group, lambda row: row.nfe), False, len(group)))
        measured = estimate_of(group, partial(score_value, name=metric), is_share)
        quality = shown(score_cell(measured, is_share, len(group)))
        lines.append((level, len(group), spent, quality))
    return {
        "svg": inline_svg(complexity_figure(own, num_requirements), "complexity"),
        "lines": lines,
        "percent": is_share,
    }


# --------------------------------------------------------------------------- judges


def judge_tables(folder: Path) -> dict[str, Any] | None:
    """What vision-language models preferred, from ``judge.json``; None where none was asked."""
    path = RunFolder(folder).judgement
    if not path.exists():
        return None
    found = read_json(path)
    try:
        return _judged_tables(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no judgement: {type(error).__name__}: {error}") from error


def _judged_tables(found: Mapping[str, Any]) -> dict[str, Any]:
    judges = {f"{name} ({one['model']})": one for name, one in found["judges"].items()}
    columns = judges if len(judges) == 1 else {**judges, "all judges": found["together"]}
    return {
        **{name: found[name] for name in ("prompts", "pictures", "spent_usd", "agreement")},
        "tables": [(name, [_pair_line(pair) for pair in one["pairs"]]) for name, one in columns.items()],
        "names": list(columns),
        "ranking": _ranking(columns),
        "notes": [f"{name}: {one['note']}" for name, one in columns.items() if one["note"]],
    }


def _pair_line(pair: Mapping[str, Any]) -> dict[str, Any]:
    """Two methods' line: shares of wins, ties and losses as cells."""

    def rate(share: float, low: float, high: float) -> Shown:
        return shown(Cell(100 * share, 1, 100 * low, 100 * high, level=share))

    return {**pair, "rates": [rate(**pair[one]) if one in pair else Shown("–") for one in OUTCOMES]}


def _ranking(columns: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[Shown]]]:
    """Methods by strength in the last column, with what each judge makes of them."""
    of = [{one["method"]: one for one in column["ranking"]} for column in columns.values()]
    names = list(dict.fromkeys(name for ranking in reversed(of) for name in ranking))
    return [(name, [_strength(ranking.get(name)) for ranking in of]) for name in names]


def _strength(found: Mapping[str, Any] | None) -> Shown:
    if found is None:
        return Shown("–")
    return shown(Cell(found["estimate"], 3, found["low"], found["high"]))
