"""What the rows say, in numbers: means with intervals, decisions, categories. Tables, plots and exports draw on these.

Any rows will do: what they do not tell is absent here, and shown as `NOT_AVAILABLE`. Averages are over pictures.
Intervals are at 95%, and the pictures of one prompt belong together in them: Wilson's with the effective number of
pictures for metrics that are 0 or 1 (`stats.effective_size`), and for others that of the normal distribution with a
clustered standard error (Liang & Zeger 1986).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from addiff_env.stats import Z95, clustered_wilson
from addiff_env.types import ACTIONS, ResultRow

EVERYTHING = "(all)"  # the category that holds all others, in tidy tables
NOT_AVAILABLE = "n/a"  # what stands where the rows do not tell a number
NO_SCORE = "no score"  # the headline of rows without any
LARGEST = 1e100  # a score or cost beyond is no measurement: its square could not be summed


@dataclass(frozen=True)
class Cost:
    """A field of a row that says what its picture cost, and how it is shown."""

    name: str
    label: str  # with its unit
    unit: float  # what one unit is in the row
    digits: int  # behind the point
    words: str = ""  # what it is, in sentences


COSTS = (
    Cost("nfe", "NFE", 1, 1, "NFE"),
    Cost("forward_passes", "network passes", 1, 1, "network passes"),
    Cost("net_flops", "net GFLOPs", 1e9, 1, "net FLOPs"),
    Cost("seconds", "seconds", 1, 3, "the rows' own seconds"),
    Cost("timed_seconds", "timed seconds", 1, 4, "seconds"),  # only where the run was timed
    Cost("peak_memory", "peak MiB", 2**20, 0, "memory"),  # bytes; only where rows have it
)


def cost_named(name: str) -> Cost:
    """One of `COSTS`.

    Raises:
        ValueError: another name.
    """
    known = {cost.name: cost for cost in COSTS}
    if name not in known:
        raise ValueError(f"unknown cost {name!r}; known: {', '.join(known)}")
    return known[name]


@dataclass(frozen=True)
class Estimate:
    """A mean over ``number`` pictures; the interval is None where one prompt is all there is, unless it is a share."""

    number: int
    mean: float
    deviation: float  # standard deviation over pictures
    low: float | None
    high: float | None


@dataclass(frozen=True)
class MethodSummary:
    """One method on the pictures given; a metric or cost that no row has is absent."""

    method: str
    number: int  # pictures
    scores: dict[str, Estimate]
    costs: dict[str, Estimate]  # in the row's units
    actions: np.ndarray | None  # shares (3,) of the decisions taken, None where no decisions were taken


def by_method(rows: Sequence[ResultRow]) -> dict[str, list[ResultRow]]:
    """Rows grouped by method, in order of first appearance."""
    groups: dict[str, list[ResultRow]] = {}
    for row in rows:
        groups.setdefault(row.method, []).append(row)
    return groups


def categories_of(rows: Sequence[ResultRow]) -> list[str]:
    """Categories, in order of first appearance."""
    return list(dict.fromkeys(row.category for row in rows))


def score_value(row: ResultRow, name: str) -> float | None:
    """A score of a row; None where it has none, or one that is no number."""
    value = row.scores.get(name)
    return value if value is not None and _is_number(value) else None


def scores_of(row: ResultRow) -> dict[str, float]:
    """The scores of a row that are numbers."""
    return {name: value for name, value in row.scores.items() if _is_number(value)}


def _is_number(value: float) -> bool:
    return math.isfinite(value) and abs(value) <= LARGEST


def metric_names(rows: Sequence[ResultRow]) -> list[str]:
    """Names of every score that some row has, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in scores_of(row)))


def share_metrics(rows: Sequence[ResultRow]) -> frozenset[str]:
    """Metrics that are 0 or 1 in every row that has them, so that their mean is a share."""
    found: dict[str, bool] = {}
    for row in rows:
        for name, value in scores_of(row).items():
            found[name] = found.get(name, True) and value in (0, 1)
    return frozenset(name for name, is_share in found.items() if is_share)


def headline_metric(rows: Sequence[ResultRow]) -> str:
    """The first score that every row names, or else of those that most rows name; `lead_with` puts another one first.

    `NO_SCORE` where no row names any. A score that is NaN is named and not measured.
    """
    counts = Counter(name for row in rows for name in row.scores)
    return max(counts, key=lambda name: counts[name], default=NO_SCORE)


def lead_with(rows: Sequence[ResultRow], metric: str) -> list[ResultRow]:
    """The rows that have ``metric``, with it as their first score; and, it being NaN, those of methods without any."""
    measured = {row.method for row in rows if score_value(row, metric) is not None}
    return [
        replace(row, scores={**{metric: math.nan}, **row.scores})
        for row in rows
        if score_value(row, metric) is not None or row.method not in measured
    ]


def action_shares(rows: Sequence[ResultRow]) -> np.ndarray | None:
    """Shares (3,) of the decisions taken, or None where no decisions were taken."""
    taken = [action for row in rows for action in row.actions]
    return np.bincount(taken, minlength=len(ACTIONS)) / len(taken) if taken else None


def cost_value(row: ResultRow, name: str) -> float | None:
    """A cost of a row in its own units; None where it was not measured."""
    value = getattr(row, name, None)
    return None if value is None or not _is_number(value) or (name == "peak_memory" and not value) else float(value)


def counted(number: int, noun: str) -> str:
    """A number of things in words: ``1 prompt``, ``1,024 prompts``."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def measured_costs(rows: Sequence[ResultRow]) -> list[Cost]:
    """The costs that some row says; where there are timed seconds, these stand for the rows' own."""
    found = [cost for cost in COSTS if any(cost_value(row, cost.name) is not None for row in rows)]
    timed = any(cost.name == "timed_seconds" for cost in found)
    return [cost for cost in found if not timed or cost.name != "seconds"]


def number_text(value: float, digits: int) -> str:
    """A number with so many digits behind the point; a huge one with four in all."""
    return f"{value:.{digits}f}" if abs(value) < 1e9 else f"{value:.4g}"


# --------------------------------------------------------------------------- means


def estimate(values: Sequence[float], prompts: Sequence[str], is_share: bool = False) -> Estimate:
    """Mean of per-picture values with its interval; ``prompts`` says which pictures belong together.

    Raises:
        ValueError: no values, or another number of prompts.
    """
    if not len(values) or len(values) != len(prompts):
        raise ValueError(f"no mean of {len(values)} values of {len(prompts)} pictures")
    numbers = np.asarray(values, float)
    low, high = clustered_wilson(values, prompts) if is_share else _clustered(numbers, prompts)
    return Estimate(numbers.size, float(numbers.mean()), float(numbers.std()), low, high)


def _clustered(numbers: np.ndarray, prompts: Sequence[str]) -> tuple[float, float] | tuple[None, None]:
    _, owner = np.unique(np.asarray(prompts), return_inverse=True)
    sums = np.bincount(owner, numbers - numbers.mean())  # (prompts,)
    if sums.size < 2:
        return None, None
    variance = (sums**2).sum() / numbers.size**2 * sums.size / (sums.size - 1)
    half = Z95 * np.sqrt(variance)
    return float(numbers.mean() - half), float(numbers.mean() + half)


def estimate_of(
    rows: Sequence[ResultRow], value: Callable[[ResultRow], float | None], is_share: bool = False
) -> Estimate | None:
    """Mean of what ``value`` reads off the rows that have it; None where none has."""
    measured = [(number, row.prompt) for row in rows if (number := value(row)) is not None]
    if not measured:
        return None
    numbers, prompts = zip(*measured, strict=True)
    return estimate(numbers, prompts, is_share)


def summarise(rows: Sequence[ResultRow], shares: frozenset[str] | None = None) -> list[MethodSummary]:
    """Every method on the rows given.

    Args:
        rows: per-image rows.
        shares: metrics whose means are shares; by default `share_metrics` of the rows.
    """
    known = share_metrics(rows) if shares is None else shares
    return [
        MethodSummary(
            method,
            len(group),
            _estimates(group, metric_names(group), score_value, known),
            _estimates(group, [cost.name for cost in COSTS], cost_value, frozenset()),
            action_shares(group),
        )
        for method, group in by_method(rows).items()
    ]


def _estimates(
    group: Sequence[ResultRow],
    names: Sequence[str],
    value: Callable[[ResultRow, str], float | None],
    shares: frozenset[str],
) -> dict[str, Estimate]:
    found = {name: estimate_of(group, lambda row: value(row, name), name in shares) for name in names}  # noqa: B023
    return {name: one for name, one in found.items() if one is not None}


def tidy(rows: Sequence[ResultRow]) -> Iterator[tuple[str, str, str, Estimate]]:
    """Method, metric or cost, category, and what it is there; `EVERYTHING` first, then each category."""
    shares = share_metrics(rows)
    parts = {category: [row for row in rows if row.category == category] for category in categories_of(rows)}
    for category, part in {EVERYTHING: list(rows), **parts}.items():
        for summary in summarise(part, shares):
            for metric, found in {**summary.scores, **summary.costs}.items():
                yield summary.method, metric, category, found


# --------------------------------------------------------------------------- decisions and complexity


def decision_counts(rows: Sequence[ResultRow]) -> np.ndarray:
    """How many pictures took each action at their first, second, ... decision: int (decisions, 3)."""
    length = max((len(row.actions) for row in rows), default=0)
    counts = np.zeros((length, len(ACTIONS)), int)
    for row in rows:
        counts[np.arange(len(row.actions)), row.actions] += 1
    return counts


def by_num_requirements(
    rows: Sequence[ResultRow], num_requirements: Mapping[tuple[str, int], int]
) -> dict[int, list[ResultRow]]:
    """Rows by how much their pictures must get right (`Item.num_requirements`), least first.

    Raises:
        ValueError: a row of no known (prompt, seed).
    """
    levels: dict[int, list[ResultRow]] = {}
    for row in rows:
        if (row.prompt, row.seed) not in num_requirements:
            raise ValueError(f"{row.prompt!r}, seed {row.seed} belongs to no item: its complexity is not known")
        levels.setdefault(num_requirements[row.prompt, row.seed], []).append(row)
    return dict(sorted(levels.items()))
