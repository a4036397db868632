"""The numbers of the page: tables of rows, comparisons and judges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from addiff_env.evaluation.metrics.set_results import SPREAD, SetResults
from addiff_env.evaluation.report.figures import complexity_figure, shares_text
from addiff_env.evaluation.report.svg import inline_svg
from addiff_env.evaluation.statistics.comparisons import compare_methods
from addiff_env.evaluation.statistics.families import agent_runs
from addiff_env.evaluation.statistics.hypotheses import LEAST_PROMPTS
from addiff_env.evaluation.statistics.pairing import on_common_pictures
from addiff_env.evaluation.statistics.summary import (
    COSTS,
    NOT_AVAILABLE,
    Estimate,
    MethodSummary,
    by_facts,
    by_method,
    categories_of,
    estimate,
    headline_metric,
    metric_names,
    number_text,
    score_value,
    scores_of,
    share_metrics,
    summarise,
)
from addiff_env.evaluation.vlm_judge.client import JUDGEMENT
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
class Cell:
    """An estimate as shown: percent where it is a share."""

    mean: str
    interval: str = ""
    note: str = ""  # e.g. how many pictures, where not all have the metric
    level: float | None = None  # in [0, 1], for shading; None: not shaded


def _cell(found: Estimate | None, is_share: bool, number: int) -> Cell:
    """An estimate over some of ``number`` pictures; not available where none of them has it."""
    if found is None:
        return Cell(NOT_AVAILABLE)
    scale, digits = (100, 1) if is_share else (1, 3)
    note = "" if found.number == number else f"n = {found.number:,}"
    interval = ""
    if found.low is not None and found.high is not None:
        interval = f"{fixed_text(scale * found.low, digits)} to {fixed_text(scale * found.high, digits)}"
    return Cell(fixed_text(scale * found.mean, digits), interval, note, found.mean if is_share else None)


def fixed_text(value: float, digits: int) -> str:
    """A number as the page shows it: a dash for NaN, a proper minus sign."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):  # an effect size where every prompt differs by the same
        return "∞" if value > 0 else "−∞"
    return (f"{value:,.{digits}f}" if abs(value) < 1e9 else number_text(value, digits)).replace("-", "−")


def method_table(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """The main table: quality, costs and actions of each method."""
    metric, shares, summaries = headline_metric(rows), share_metrics(rows), summarise(rows)
    costs = [cost for cost in COSTS if any(cost.name in summary.costs for summary in summaries)]
    lines = []
    for summary in summaries:
        shown = [_cost_text(summary, cost.name, cost.unit, cost.digits) for cost in costs]
        quality = _cell(summary.scores.get(metric), metric in shares, summary.number)
        lines.append((summary.method, summary.number, quality, shown, shares_text(summary.actions)))
    return {"costs": [cost.label for cost in costs], "lines": lines, "percent": metric in shares}


def _cost_text(summary: MethodSummary, name: str, unit: float, digits: int) -> str:
    found = summary.costs.get(name)
    if found is None:
        return "–"
    spread = f" ± {fixed_text(found.deviation, 1)}" if name == "nfe" else ""
    return fixed_text(found.mean / unit, digits) + spread


def metric_table(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """Every per-image metric of every method."""
    names, shares = metric_names(rows), share_metrics(rows)
    lines = [
        (summary.method, [_cell(summary.scores.get(name), name in shares, summary.number) for name in names])
        for summary in summarise(rows)
    ]
    return {"names": [name + " (%)" * (name in shares) for name in names], "lines": lines}


def whole_tables(whole: SetResults) -> dict[str, Any] | None:
    """Protocols and set metrics as tables of text; None where there are none."""
    if not whole:
        return None
    tables = []
    for metric, methods in whole.protocols.items():
        names = whole.categories(metric)
        lines = [(name, [_digits(means.get(key)) for key in names]) for name, means in methods.items()]
        tables.append({"title": f"{metric}, by its own protocol", "names": names, "lines": lines})
    if whole.sets:
        names = whole.set_names()
        lines = [
            (name, [f"{values['pictures']:,}", *(_set_value(values, key) for key in names)])
            for name, values in whole.sets.items()
        ]
        tables.append({"title": "set metrics", "names": ["pictures", *names], "lines": lines})
    return {"tables": tables, "references": list(whole.references.items()), "notes": whole.notes}


def _set_value(values: Mapping[str, float], name: str) -> str:
    spread = values.get(SPREAD.get(name, ""))
    return _digits(values.get(name)) + ("" if spread is None else f" ± {_digits(spread)}")


def _digits(value: float | None) -> str:
    return NOT_AVAILABLE if value is None else fixed_text(value, 4)


def category_tables(rows: Sequence[ResultRow]) -> list[dict[str, Any]]:
    """One table per metric, methods by categories; the headline metric first."""
    shares, categories, headline = share_metrics(rows), categories_of(rows), headline_metric(rows)
    parts = [[row for row in rows if row.category == category] for category in categories]
    found = [{summary.method: summary for summary in summarise(part, shares)} for part in parts]
    numbers = [len({(row.prompt, row.seed) for row in part}) for part in parts]
    tables = []
    for name in sorted(metric_names(rows), key=lambda name: name != headline):
        lines = [(method, [_of(summaries, method, name, shares) for summaries in found]) for method in by_method(rows)]
        tables.append({"metric": name + " (%)" * (name in shares), "lines": lines})
    return [{**table, "categories": list(zip(categories, numbers, strict=True))} for table in tables]


def _of(summaries: Mapping[str, MethodSummary], method: str, metric: str, shares: frozenset[str]) -> Cell:
    if method not in summaries:
        return Cell("–")
    return _cell(summaries[method].scores.get(metric), metric in shares, summaries[method].number)


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


def complexity_table(own: Sequence[ResultRow], facts: Mapping[SampleKey, int]) -> dict[str, Any]:
    """NFE and quality by how much the pictures must get right."""
    metric = headline_metric(own)
    is_share = metric in share_metrics(own)
    lines = []
    for level, group in by_facts(own, facts).items():
        prompts = [row.prompt for row in group]
        spent = _cell(estimate([row.nfe for row in group], prompts), False, len(group))
        quality = _cell(_estimate_of(metric, group, is_share), is_share, len(group))
        lines.append((level, len(group), spent, quality))
    return {"svg": inline_svg(complexity_figure(own, facts), "complexity"), "lines": lines, "percent": is_share}


def _estimate_of(metric: str, group: Sequence[ResultRow], is_share: bool) -> Estimate | None:
    measured = [(value, row.prompt) for row in group if (value := score_value(row, metric)) is not None]
    return (
        estimate([value for value, _ in measured], [prompt for _, prompt in measured], is_share) if measured else None
    )


# --------------------------------------------------------------------------- judges


def judge_tables(folder: Path) -> dict[str, Any] | None:
    """What vision-language models preferred, from ``judge.json``; None where nobody was asked."""
    path = folder / JUDGEMENT
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
    rates = [_rate(pair[outcome], pair["pairs"]) if outcome in pair else Cell("–") for outcome in OUTCOMES]
    return {**pair, "rates": rates}


def _rate(found: Mapping[str, float], number: int) -> Cell:
    return _cell(Estimate(number, found["share"], 0.0, found["low"], found["high"]), True, number)


def _ranking(columns: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[Cell]]]:
    """Methods by strength in the last column, with what each judge makes of them."""
    of = [{one["method"]: one for one in column["ranking"]} for column in columns.values()]
    names = list(dict.fromkeys(name for ranking in reversed(of) for name in ranking))
    return [(name, [_strength(ranking.get(name)) for ranking in of]) for name in names]


def _strength(found: Mapping[str, Any] | None) -> Cell:
    if found is None:
        return Cell("–")
    return Cell(fixed_text(found["estimate"], 3), f"{fixed_text(found['low'], 3)} to {fixed_text(found['high'], 3)}")
