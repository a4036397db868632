"""The tables for other programs: LaTeX (booktabs) and tidy CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from addiff_env.evaluation.metrics.set_results import SPREAD, SetResults
from addiff_env.evaluation.report.figures import shares_text
from addiff_env.evaluation.statistics.summary import (
    COSTS,
    NOT_AVAILABLE,
    Estimate,
    MethodSummary,
    categories_of,
    headline_metric,
    number_text,
    share_metrics,
    summarise,
    tidy,
)
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


def _blank(value: float | None) -> float | str:
    return "" if value is None else value


def latex_escape(text: str) -> str:
    """Text that LaTeX sets as it stands, line breaks as spaces."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def latex_table(rows: Sequence[ResultRow], caption: str, whole: SetResults = SetResults()) -> str:  # noqa: B008 (frozen)
    r"""Tables of each method's quality and cost, its quality by category, and what was measured of ``whole`` sets.

    They need ``\usepackage{booktabs}``.
    """
    metric, shares = headline_metric(rows), share_metrics(rows)
    is_share, name = metric in shares, latex_escape(metric)
    summaries = summarise(rows, shares)
    costs = [cost for cost in COSTS if any(cost.name in summary.costs for summary in summaries)]
    head = ["method", "$n$", name + r" (\%)" * is_share, r"95\% interval", *(latex_escape(c.label) for c in costs)]
    body = [_latex_line(summary, metric, is_share, [cost.name for cost in costs]) for summary in summaries]
    main = _tabular([*head, "continue/stop/refine"], body)
    text = latex_escape(caption)
    return "\n".join(
        [
            "% \\usepackage{booktabs}",
            *_float(main, f"{text}. Means over pictures; in parentheses the standard deviation of NFE."),
            "",
            *_float(_category_table(rows, metric, shares), f"{text}: {name}{' in percent' * is_share} by category."),
            "",
            *_whole_tables(whole, text),
        ]
    )


def _latex_line(summary: MethodSummary, metric: str, is_share: bool, costs: Sequence[str]) -> list[str]:
    quality = summary.scores.get(metric)
    scale, digits = (100, 1) if is_share else (1, 3)
    cells = [latex_escape(summary.method), str(summary.number)]
    if quality is None:
        cells += [NOT_AVAILABLE, "--"]
    else:
        cells += [_number(scale * quality.mean, digits), _latex_interval(quality, scale, digits)]
    cells += [_latex_cost(summary, name) for name in costs]
    return [*cells, "--" if summary.actions is None else shares_text(summary.actions)]


def _number(value: float, digits: int) -> str:
    return number_text(value, digits).replace("-", "$-$")


def _latex_interval(found: Estimate, scale: float, digits: int) -> str:
    if found.low is None or found.high is None:
        return "--"
    return f"[{_number(scale * found.low, digits)}, {_number(scale * found.high, digits)}]"


def _latex_cost(summary: MethodSummary, name: str) -> str:
    if name not in summary.costs:
        return "--"
    cost = next(cost for cost in COSTS if cost.name == name)
    found = summary.costs[name]
    spread = f" ({found.deviation:.1f})" if name == "nfe" else ""
    return f"{found.mean / cost.unit:.{cost.digits}f}{spread}"


def _category_table(rows: Sequence[ResultRow], metric: str, shares: frozenset[str]) -> list[str]:
    categories = categories_of(rows)
    found: dict[str, dict[str, Estimate | None]] = {}
    for category in categories:
        for summary in summarise([row for row in rows if row.category == category], shares):
            found.setdefault(summary.method, {})[category] = summary.scores.get(metric)
    scale, digits = (100, 0) if metric in shares else (1, 2)

    def cell(means: dict[str, Estimate | None], category: str) -> str:
        if category not in means:
            return "--"
        mean = means[category]
        return NOT_AVAILABLE if mean is None else _number(scale * mean.mean, digits)

    body = [[latex_escape(method), *(cell(of, category) for category in categories)] for method, of in found.items()]
    return _tabular(["method", *(latex_escape(category) for category in categories)], body)


def _whole_tables(whole: SetResults, caption: str) -> list[str]:
    """A table per protocol, and one of the set metrics."""
    tables = []
    for metric, methods in whole.protocols.items():
        names = whole.categories(metric)
        body = [[name, *(_optional(means.get(key)) for key in names)] for name, means in methods.items()]
        tables.append((names, body, f"{latex_escape(metric)} by its own protocol"))
    if whole.sets:
        names = whole.set_names()
        body = [[name, *(_set_value(values, key) for key in names)] for name, values in whole.sets.items()]
        tables.append((names, body, "set metrics; of KID, in parentheses, the standard deviation over subsets"))
    lines: list[str] = []
    for names, body, title in tables:
        head = ["method", *map(latex_escape, names)]
        cells = [[latex_escape(line[0]), *line[1:]] for line in body]
        lines += [*_float(_tabular(head, cells), f"{caption}: {title}."), ""]
    return lines


def _set_value(values: dict[str, float], name: str) -> str:
    spread = values.get(SPREAD.get(name, ""))
    return _optional(values.get(name)) + ("" if spread is None else f" ({_number(spread, 4)})")


def _optional(value: float | None) -> str:
    return "--" if value is None else _number(value, 4)


def _tabular(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = [" & ".join(cells) + r" \\" for cells in (head, *body)]
    columns = "l" + "r" * (len(head) - 1)
    return [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"] + [
        r"\end{tabular}"
    ]


def _float(tabular: Sequence[str], caption: str) -> list[str]:
    return [r"\begin{table}", r"\centering", *tabular, rf"\caption{{{caption}}}", r"\end{table}"]
