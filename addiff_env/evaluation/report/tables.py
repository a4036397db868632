"""Tables of an evaluation: numbers first, and the styles in which text, LaTeX and HTML show them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from addiff_env.evaluation.metrics.set_results import SPREAD, SetResults
from addiff_env.evaluation.statistics.summary import (
    NOT_AVAILABLE,
    Cost,
    Estimate,
    MethodSummary,
    by_method,
    categories_of,
    number_text,
    share_metrics,
    summarise,
)
from addiff_env.types import ResultRow


@dataclass(frozen=True)
class Cell:
    """A number in the unit shown, percent where it is a share, with what else is known of it."""

    value: float
    digits: int  # behind the point
    low: float | None = None
    high: float | None = None
    spread: float | None = None  # standard deviation
    note: str = ""  # e.g. how many pictures, where not all have the metric
    level: float | None = None  # in [0, 1], for shading; None: not shaded


Entry = Cell | str | None  # str: words as they stand; None: nothing to say


@dataclass(frozen=True)
class Table:
    """Methods by columns."""

    columns: Sequence[str]
    lines: Sequence[tuple[str, Sequence[Entry]]]  # method, an entry per column


@dataclass(frozen=True)
class Style:
    """How numbers are written."""

    dash: str  # where there is nothing to say
    number: Callable[[float, int], str]  # value, digits
    between: Callable[[str, str], str]  # the ends of an interval
    spread: str  # around a standard deviation

    def value(self, entry: Entry, missing: str | None = None) -> str:
        """The entry without its interval; ``missing`` stands where there is nothing to say, by default the dash."""
        if entry is None:
            return self.dash if missing is None else missing
        if isinstance(entry, str):
            return entry
        spread = "" if entry.spread is None else self.spread.format(self.number(entry.spread, entry.digits))
        return self.number(entry.value, entry.digits) + spread

    def interval(self, entry: Entry, missing: str | None = None) -> str:
        """Both ends of the entry's interval; ``missing``, by default the dash, where it has none."""
        if not isinstance(entry, Cell) or entry.low is None or entry.high is None:
            return self.dash if missing is None else missing
        return self.between(self.number(entry.low, entry.digits), self.number(entry.high, entry.digits))


def fixed_text(value: float, digits: int) -> str:
    """A number as the page shows it: a dash for NaN, a proper minus sign."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):  # an effect size where every prompt differs by the same
        return "∞" if value > 0 else "−∞"
    return (f"{value:,.{digits}f}" if abs(value) < 1e9 else number_text(value, digits)).replace("-", "−")


def _plain_interval(low: str, high: str) -> str:
    return f"{low} to {high}" if {"-", "e"} & set(low + high) else f"{low}-{high}"


TEXT = Style("-", number_text, _plain_interval, " ({})")
LATEX = Style("--", lambda value, digits: number_text(value, digits).replace("-", "$-$"), "[{}, {}]".format, " ({})")
HTML = Style("–", fixed_text, "{} to {}".format, " ± {}")


def with_interval(entry: Entry, style: Style) -> str:
    """An entry in one text: the number, and in brackets its interval or else its note."""
    further = style.interval(entry, "") or (entry.note if isinstance(entry, Cell) else "")
    return style.value(entry) + (f" [{further.strip('[]')}]" if further else "")


# --------------------------------------------------------------------------- what tables hold


def score_cell(found: Estimate | None, is_share: bool, number: int, digits: tuple[int, int] = (1, 3)) -> Entry:
    """A mean over some of ``number`` pictures; `NOT_AVAILABLE` where none of them has it.

    ``digits`` are those of percentages and of other numbers.
    """
    if found is None:
        return NOT_AVAILABLE
    scale = 100 if is_share else 1
    low, high = (None if end is None else scale * end for end in (found.low, found.high))
    note = "" if found.number == number else f"n = {found.number:,}"
    level = found.mean if is_share else None
    return Cell(scale * found.mean, digits[0] if is_share else digits[1], low, high, note=note, level=level)


def cost_cell(summary: MethodSummary, cost: Cost) -> Entry:
    """A method's mean cost, of NFE with the standard deviation; None where no row says it."""
    found = summary.costs.get(cost.name)
    if found is None:
        return None
    return Cell(found.mean / cost.unit, cost.digits, spread=found.deviation if cost.name == "nfe" else None)


def shares_text(summary: MethodSummary) -> str | None:
    """Shares of continue, stop and refine in percent; None where no decisions were taken."""
    return None if summary.actions is None else "/".join(f"{100 * share:.0f}" for share in summary.actions)


def method_table(rows: Sequence[ResultRow], metric: str, costs: Sequence[Cost]) -> Table:
    """Quality, costs and decisions of each method: pictures, the metric, every cost, shares of the actions."""
    shares = share_metrics(rows)
    lines = [
        (
            summary.method,
            [
                Cell(summary.number, 0),
                score_cell(summary.scores.get(metric), metric in shares, summary.number),
                *(cost_cell(summary, cost) for cost in costs),
                shares_text(summary),
            ],
        )
        for summary in summarise(rows, shares)
    ]
    return Table(["n", metric, *(cost.label for cost in costs), "continue/stop/refine"], lines)


def metric_table(rows: Sequence[ResultRow], names: Sequence[str]) -> Table:
    """Metrics of each method."""
    shares = share_metrics(rows)
    lines = [
        (s.method, [score_cell(s.scores.get(name), name in shares, s.number) for name in names])
        for s in summarise(rows)
    ]
    return Table([name + " (%)" * (name in shares) for name in names], lines)


def category_tables(rows: Sequence[ResultRow], metrics: Iterable[str], digits: tuple[int, int] = (1, 3)) -> list[Table]:
    """A table for each metric, methods by categories; None where a method has no picture of one."""
    shares, categories = share_metrics(rows), categories_of(rows)
    parts = [[row for row in rows if row.category == category] for category in categories]
    found = [{summary.method: summary for summary in summarise(part, shares)} for part in parts]

    def entry(summary: MethodSummary | None, metric: str) -> Entry:
        if summary is None:
            return None
        return score_cell(summary.scores.get(metric), metric in shares, summary.number, digits)

    return [
        Table(categories, [(name, [entry(summaries.get(name), m) for summaries in found]) for name in by_method(rows)])
        for m in metrics
    ]


def protocol_table(found: SetResults, metric: str) -> Table:
    """A benchmark's own numbers of each method."""
    names = found.categories(metric)
    return _number_table(names, found.protocols[metric])


def set_table(found: SetResults) -> Table:
    """Set metrics of each method, of KID with the standard deviation over subsets."""
    return _number_table(found.set_names(), found.sets)


def _number_table(names: Sequence[str], found: Mapping[str, Mapping[str, float]]) -> Table:
    def entry(values: Mapping[str, float], name: str) -> Entry:
        return Cell(values[name], 4, spread=values.get(SPREAD.get(name, ""))) if name in values else None

    return Table(names, [(method, [entry(values, name) for name in names]) for method, values in found.items()])
