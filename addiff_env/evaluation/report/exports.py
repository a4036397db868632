"""The tables for other programs: LaTeX (booktabs) and tidy CSV."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from addiff_env.evaluation.metrics.models import model_notes, models_of
from addiff_env.evaluation.metrics.set_results import SetResults
from addiff_env.evaluation.report.tables import (
    LATEX,
    Entry,
    Table,
    category_tables,
    method_table,
    protocol_table,
    set_table,
    with_interval,
)
from addiff_env.evaluation.statistics.decision import Decision, estimate_text
from addiff_env.evaluation.statistics.summary import (
    NOT_AVAILABLE,
    headline_metric,
    measured_costs,
    share_metrics,
    tidy,
)
from addiff_env.evaluation.statistics.tiers import by_tier
from addiff_env.storage.files import replacing
from addiff_env.types import ResultRow

WHOLE_HEAD = ("method", "metric", "category", "pictures", "value", "sd", "models")  # sd: over random subsets, of KID
CSV_HEAD = ("method", "metric", "category", "pictures", "mean", "sd", "low", "high", "models")  # models: which made it
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: "\\" + character for character in "&%$#_{}"},
}


def write_csv(rows: Sequence[ResultRow], path: Path, models: Mapping[str, str] = MappingProxyType({})) -> None:
    """One line per method, metric (or cost) and category, see `tidy`; costs in the units of `ResultRow`.

    ``models`` says by which models scores were made, see `metric_models`.
    """
    lines = (
        [method, metric, category, e.number, e.mean, e.deviation, e.low, e.high, models_of(metric, models)]
        for method, metric, category, e in tidy(rows)
    )
    write_lines(path, CSV_HEAD, lines)


def write_set_results_csv(whole: SetResults, path: Path, models: Mapping[str, str] = MappingProxyType({})) -> None:
    """One line per method, protocol or set metric, and category; ``models`` as in `write_csv`."""
    write_lines(path, WHOLE_HEAD, ([*line, models_of(line[1], models)] for line in whole.lines()))


VERDICTS_HEAD = ("tier", "hypothesis", "verdict", "prompts", "estimate", "low", "high", "p", "p_corrected", "reason")


def write_verdicts_csv(verdicts: Sequence[Decision], path: Path) -> None:
    """One line per hypothesis; estimate and interval are those of the part that its p-value is of.

    Where there is no p-value its cells and the interval's are empty, and the reason says why.
    """
    lines = []
    for tier, found in by_tier(verdicts):
        for one in found:
            part = one.deciding
            numbers = [None] * 3 if part is None else [part.estimate, part.low, part.high]
            reason = one.reason if one.p is not None else f"{one.reason} (no p-value: {one.lacking})"
            head = [tier.title, one.hypothesis, one.outcome, one.prompts]
            lines.append([*head, *numbers, one.p, one.p_corrected, reason])
    write_lines(path, VERDICTS_HEAD, lines)


def write_lines(path: Path, head: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file at once; what is None is an empty cell."""
    with replacing(path) as whole, whole.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *lines])


def latex_escape(text: str) -> str:
    """Text that LaTeX sets as it stands, line breaks as spaces."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def latex_table(
    rows: Sequence[ResultRow],
    caption: str,
    whole: SetResults = SetResults(),  # noqa: B008 (frozen)
    verdicts: Sequence[Decision] = (),
    models: Mapping[str, str] = MappingProxyType({}),
    speeds: Table | None = None,
    notes: Sequence[str] = (),
) -> str:
    r"""Tables of each method's quality and cost, its quality by category, the verdicts, and of ``whole`` sets.

    ``models`` says by which models scores were made, see `metric_models`; ``speeds`` are pictures a second, and
    ``notes`` stand below the tables that show seconds. They need ``\usepackage{booktabs}``.
    """
    metric = headline_metric(rows)
    is_share, name, text = metric in share_metrics(rows), latex_escape(metric), latex_escape(caption)
    (by_category,) = category_tables(rows, [metric], (0, 2))
    by, seconds = _sentences(model_notes([metric], models)), _sentences(notes)
    means = f"{text}. Means over pictures; in parentheses the standard deviation of NFE.{by}{seconds}"
    return "\n".join(
        [
            "% \\usepackage{booktabs}",
            *_float(_main_table(rows), means),
            "",
            *_float(_escaped(by_category), f"{text}: {name}{' in percent' * is_share} by category.{by}"),
            "",
            *_verdict_tables(verdicts, text),
            *_set_tables(whole, text, models),
            *_speed_table(speeds, f"{text}: pictures a second at equal quality.{by}{seconds}"),
        ]
    )


def _sentences(notes: Sequence[str]) -> str:
    return "".join(f" {latex_escape(note[0].upper() + note[1:])}." for note in notes)


def _speed_table(speeds: Table | None, caption: str) -> list[str]:
    """Pictures a second, of the ratio with its interval."""
    if speeds is None or not speeds.lines:
        return []
    return [*_float(_escaped(speeds, partial(with_interval, style=LATEX)), caption), ""]


def _verdict_tables(verdicts: Sequence[Decision], caption: str) -> list[str]:
    """A table per tier: verdict, what its p-value is of, and both p-values."""
    lines = []
    for tier, found in by_tier(verdicts):
        body = [
            [latex_escape(text) for text in (one.hypothesis, one.outcome, estimate_text(one.deciding) or NOT_AVAILABLE)]
            + [_p_value(one.p), _p_value(one.p_corrected)]
            for one in found
        ]
        table = _tabular(["hypothesis", "verdict", "estimate [interval]", "$p$", "$p$ corrected"], body)
        missing = [f" {one.hypothesis} has no p-value: {one.lacking}." for one in found if one.p is None]
        words = f"Verdicts, {tier.title[0].lower()}{tier.title[1:]}.{''.join(missing)}"
        lines += [*_float(table, f"{caption}. {latex_escape(words)}"), ""]
    return lines


def _p_value(p: float | None) -> str:
    return NOT_AVAILABLE if p is None else "$<$ 0.0001" if p < 1e-4 else f"{p:.2g}"


def _main_table(rows: Sequence[ResultRow]) -> list[str]:
    metric = headline_metric(rows)
    costs = measured_costs(rows)
    head = ["method", "$n$", latex_escape(metric) + r" (\%)" * (metric in share_metrics(rows)), r"95\% interval"]
    body = [
        [latex_escape(method), LATEX.value(number), LATEX.value(quality), LATEX.interval(quality)]
        + [LATEX.value(entry) for entry in others]
        for method, (number, quality, *others) in method_table(rows, metric, costs).lines
    ]
    return _tabular([*head, *(latex_escape(cost.label) for cost in costs), "continue/stop/refine"], body)


def _escaped(table: Table, show: Callable[[Entry], str] = LATEX.value) -> list[str]:
    body = [
        [latex_escape(method), *(latex_escape(one) if isinstance(one, str) else show(one) for one in entries)]
        for method, entries in table.lines
    ]
    return _tabular(["method", *map(latex_escape, table.columns)], body)


def _set_tables(whole: SetResults, caption: str, models: Mapping[str, str]) -> list[str]:
    """A table per protocol, and one of the set metrics."""
    tables = [
        (protocol_table(whole, m), f"{latex_escape(m)} by its own protocol.{_sentences(model_notes([m], models))}")
        for m in whole.protocols
    ]
    if whole.sets:
        title = "set metrics; of KID, in parentheses, the standard deviation over subsets."
        tables.append((set_table(whole), title))
    return [line for table, title in tables for line in (*_float(_escaped(table), f"{caption}: {title}"), "")]


def _tabular(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = [" & ".join(cells) + r" \\" for cells in (head, *body)]
    columns = "l" + "r" * (len(head) - 1)
    return [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"] + [
        r"\end{tabular}"
    ]


def _float(tabular: Sequence[str], caption: str) -> list[str]:
    return [r"\begin{table}", r"\centering", *tabular, rf"\caption{{{caption}}}", r"\end{table}"]
