"""The tables for other programs: LaTeX (booktabs) and tidy CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from addiff_env.evaluation.metrics.set_results import SetResults
from addiff_env.evaluation.report.tables import LATEX, Table, category_tables, method_table, protocol_table, set_table
from addiff_env.evaluation.statistics.decision import Decision, estimate_text
from addiff_env.evaluation.statistics.summary import (
    NOT_AVAILABLE,
    headline_metric,
    measured_costs,
    share_metrics,
    tidy,
)
from addiff_env.evaluation.statistics.tiers import by_tier
from addiff_env.types import ResultRow

WHOLE_HEAD = ("method", "metric", "category", "pictures", "value", "sd")  # sd: over random subsets, of KID
CSV_HEAD = ("method", "metric", "category", "pictures", "mean", "sd", "low", "high")
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: "\\" + character for character in "&%$#_{}"},
}


def write_csv(rows: Sequence[ResultRow], path: Path) -> None:
    """One line per method, metric (or cost) and category, see `tidy`; costs in the units of `ResultRow`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_HEAD)
        for method, metric, category, e in tidy(rows):
            writer.writerow([method, metric, category, e.number, e.mean, e.deviation, _blank(e.low), _blank(e.high)])


def write_set_results_csv(whole: SetResults, path: Path) -> None:
    """One line per method, protocol or set metric, and category."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(WHOLE_HEAD)
        writer.writerows([cell if isinstance(cell, str) else _blank(cell) for cell in line] for line in whole.lines())


VERDICTS_HEAD = ("tier", "hypothesis", "verdict", "prompts", "estimate", "low", "high", "p", "p_corrected", "reason")


def write_verdicts_csv(verdicts: Sequence[Decision], path: Path) -> None:
    """One line per hypothesis; estimate and interval are those of the part that its p-value is of.

    Where there is no p-value its cells and the interval's are empty, and the reason says why.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(VERDICTS_HEAD)
        for tier, found in by_tier(verdicts):
            for one in found:
                part = one.deciding
                numbers = [] if part is None else [part.estimate, part.low, part.high]
                cells = [*(numbers or [None] * 3), one.p, one.p_corrected]
                reason = one.reason if one.p is not None else f"{one.reason} (no p-value: {one.lacking})"
                writer.writerow([tier.title, one.hypothesis, one.outcome, one.prompts, *map(_blank, cells), reason])


def _blank(value: float | None) -> float | str:
    return "" if value is None else value


def latex_escape(text: str) -> str:
    """Text that LaTeX sets as it stands, line breaks as spaces."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def latex_table(
    rows: Sequence[ResultRow],
    caption: str,
    whole: SetResults = SetResults(),  # noqa: B008 (frozen)
    verdicts: Sequence[Decision] = (),
) -> str:
    r"""Tables of each method's quality and cost, its quality by category, the verdicts, and of ``whole`` sets.

    They need ``\usepackage{booktabs}``.
    """
    metric = headline_metric(rows)
    is_share, name, text = metric in share_metrics(rows), latex_escape(metric), latex_escape(caption)
    (by_category,) = category_tables(rows, [metric], (0, 2))
    return "\n".join(
        [
            "% \\usepackage{booktabs}",
            *_float(_main_table(rows), f"{text}. Means over pictures; in parentheses the standard deviation of NFE."),
            "",
            *_float(_escaped(by_category), f"{text}: {name}{' in percent' * is_share} by category."),
            "",
            *_verdict_tables(verdicts, text),
            *_set_tables(whole, text),
        ]
    )


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


def _escaped(table: Table) -> list[str]:
    body = [[latex_escape(method), *map(LATEX.value, entries)] for method, entries in table.lines]
    return _tabular(["method", *map(latex_escape, table.columns)], body)


def _set_tables(whole: SetResults, caption: str) -> list[str]:
    """A table per protocol, and one of the set metrics."""
    tables = [(protocol_table(whole, m), f"{latex_escape(m)} by its own protocol") for m in whole.protocols]
    if whole.sets:
        title = "set metrics; of KID, in parentheses, the standard deviation over subsets"
        tables.append((set_table(whole), title))
    return [line for table, title in tables for line in (*_float(_escaped(table), f"{caption}: {title}."), "")]


def _tabular(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = [" & ".join(cells) + r" \\" for cells in (head, *body)]
    columns = "l" + "r" * (len(head) - 1)
    return [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"] + [
        r"\end{tabular}"
    ]


def _float(tabular: Sequence[str], caption: str) -> list[str]:
    return [r"\begin{table}", r"\centering", *tabular, rf"\caption{{{caption}}}", r"\end{table}"]
