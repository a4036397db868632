"""Pictures a second at equal quality: each method beside the cheapest fixed-step method that is at least as good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from addiff_env.evaluation.statistics.decision import Rules
from addiff_env.evaluation.statistics.families import members_of, solver_fronts
from addiff_env.evaluation.statistics.hypotheses import LEAST_PROMPTS
from addiff_env.evaluation.statistics.pairing import costs_of, on_common_pictures, score_of
from addiff_env.evaluation.statistics.replicates import read_paired, resample_means
from addiff_env.evaluation.statistics.spending import at_seconds
from addiff_env.evaluation.statistics.summary import by_method, score_value
from addiff_env.evaluation.statistics.timings import TIMED, Timings
from addiff_env.types import ResultRow

Means = Mapping[str, np.ndarray]  # of each method (D, 2): quality, seconds a picture


@dataclass(frozen=True)
class Speed:
    """A method's pictures a second, and those of the fixed-step method that one would have to take instead.

    Attributes:
        seconds: a picture.
        rival: the cheapest fixed-step method whose mean quality is at least this one's; None: none is as good.
        rival_seconds: infinite where there is none.
        low, high: of `ratio`, at the level of the rules; infinite where no rival is as good. None: too few prompts.
    """

    method: str
    quality: float
    seconds: float
    rival: str | None
    rival_seconds: float
    low: float | None = None
    high: float | None = None

    @property
    def per_second(self) -> float:
        """Pictures a second."""
        return 1 / self.seconds

    @property
    def ratio(self) -> float:
        """Pictures a second, as a multiple of the rival's."""
        return self.rival_seconds / self.seconds


def equal_quality_speeds(
    rows: Sequence[ResultRow],
    timings: Timings,
    rules: Rules = Rules(),  # noqa: B008 (frozen)
) -> list[Speed]:
    """Every method that was timed and has the rules' metric, on the pictures that all of these have.

    The interval resamples prompts and rounds, and looks for the rival anew in each replicate: which method is as good
    is not known for sure either.

    Args:
        rows: per-image rows.
        timings: of the rows' methods.
        rules: metric, level, number and seed of the replicates.

    Returns:
        In the rows' order; nothing where no method was timed.
    """
    timed = [row for row in timings.onto(rows) if getattr(row, TIMED) and score_value(row, rules.metric) is not None]
    names = list(by_method(timed))
    paired, _ = on_common_pictures(timed, names)
    if not paired:
        return []
    fixed = members_of(solver_fronts(names))
    groups = {name: [name] for name in names}
    read = read_paired(paired, groups, [score_of(rules.metric), costs_of(TIMED)], rules)
    if read.prompts < LEAST_PROMPTS:
        means = {name: np.average(array, axis=-1, weights=read.pictures).mean(1) for name, array in read.values.items()}
        return [_speed(name, means, fixed) for name in names]
    found = at_seconds(timings).with_rounds(resample_means(read, rules), groups, rules)
    return [_speed(name, found.means, fixed, found.draws, rules.level) for name in names]


def _speed(name: str, means: Means, fixed: Sequence[str], draws: Means | None = None, level: float = 0.9) -> Speed:
    quality, seconds = (float(value) for value in means[name])
    reach = {other: float(means[other][1]) for other in fixed if means[other][0] >= quality}
    rival = min(reach, key=lambda other: reach[other], default=None)
    ends: list[float | None] = [None, None]
    if draws is not None:
        ratios = _rival_seconds(draws[name][:, 0], [draws[other] for other in fixed]) / draws[name][:, 1]
        ends = [float(np.quantile(ratios, q, method="nearest")) for q in ((1 - level) / 2, (1 + level) / 2)]
    return Speed(name, quality, seconds, rival, reach[rival] if rival else np.inf, *ends)


def _rival_seconds(quality: np.ndarray, fixed: Sequence[np.ndarray]) -> np.ndarray:
    """Seconds (D,) of the cheapest of ``fixed`` (D, 2) whose quality is at least ``quality`` (D,); else infinite."""
    cheapest = np.full(len(quality), np.inf)
    for other in fixed:
        cheapest = np.minimum(cheapest, np.where(other[:, 0] >= quality, other[:, 1], np.inf))
    return cheapest
