"""The front of fixed-step inference: what it reaches at each cost by tossing a coin between two methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from addiff_env.evaluation.statistics.bootstrap import Interval, Resampled, critical_value, interval


@dataclass(frozen=True)
class MinDifference:
    """The smallest of several differences: how far something lies above all of them.

    It lies above a bound where every difference does, so that neither the lower bound, the smallest one, nor p, the
    largest, needs a correction for their number (an intersection-union test; Berger 1982). An upper bound does, see
    `critical_value`. Unlike a bootstrap of the minimum itself this takes the best of noisy rivals for no better than
    it is: that one takes the best anew in each replicate, which lies above the truth twice.
    """

    differences: Mapping[str, Interval]
    level: float  # of the interval

    @property
    def nearest(self) -> str:
        """Name of the smallest difference."""
        return min(self.differences, key=lambda name: self.differences[name].estimate)

    @property
    def estimate(self) -> float:
        """The smallest difference."""
        return self.differences[self.nearest].estimate

    @property
    def low(self) -> float:
        """Lower bound; its level is that of each difference's own."""
        return min(one.low for one in self.differences.values())

    @property
    def high(self) -> float:
        """Upper bound that allows for the number of differences."""
        return self.ceiling(critical_value(self.differences.values(), (1 - self.level) / 2))

    def ceiling(self, critical: float) -> float:
        """Upper bound that holds together with others, see `critical_value`."""
        return min(one.ceiling(critical) for one in self.differences.values())

    def p_below(self, bound: float) -> float:
        """One-sided p-value of "some difference is at most ``bound``"."""
        return max(one.p_below(bound) for one in self.differences.values())


def front_quality(costs: np.ndarray, qualities: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Quality of the interpolated Pareto front of fixed methods at each of D costs: (D,).

    The front is the upper concave envelope of the points: tossing a coin between two methods for each prompt reaches
    every point of their chord, so a chord is what fixed inference can do at that cost. Cheaper than every method, the
    cheapest one stands in, which favours the front; above all of them, the best one does. The best of noisy points lies
    above the best true one on average: good for drawing, while tests take `above_front`.

    Args:
        costs: mean cost of each method (D, M).
        qualities: mean quality of each method (D, M).
        at: cost of interest (D,).
    """
    cheap = costs <= at[:, None]  # (D, M)
    best = np.where(cheap, qualities, -np.inf).max(1)
    left, right = costs[:, :, None], costs[:, None, :]
    span = np.where(right > left, right - left, 1.0)
    share = (at[:, None, None] - left) / span  # (D, M, M): how far from the left method to the right one
    chord = qualities[:, :, None] * (1 - share) + qualities[:, None, :] * share
    usable = cheap[:, :, None] & (right > at[:, None, None])
    best = np.maximum(best, np.where(usable, chord, -np.inf).max((1, 2)))
    cheapest = np.take_along_axis(qualities, costs.argmin(1)[:, None], 1)[:, 0]
    return np.where(cheap.any(1), best, cheapest)


def above_front(found: Resampled, agent: str, front: Sequence[str]) -> MinDifference:
    """How far a group's quality lies above the front of others at its own mean cost, see `front_quality`.

    Measure 0 is the quality and measure 1 the cost. The group is compared with every method that costs no more,
    and with every chord between one of these and one that costs more: their mixture at the group's cost. Which is
    which is read off the mean costs, as they are; a chord's mixture follows the costs of each replicate. The
    cheapest method stands in where all cost more.

    Raises:
        ValueError: an empty front.
    """
    if not front:
        raise ValueError("a front needs at least one fixed method")
    own = found.means[agent][1]
    cheap = [name for name in front if found.means[name][1] <= own]
    above = [name for name in front if found.means[name][1] > own]
    members = cheap or [min(front, key=lambda name: found.means[name][1])]
    differences = {name: found.difference(agent, name) for name in members}
    chords = {f"{left} with {right}": _above_chord(found, agent, left, right) for left in cheap for right in above}
    return MinDifference({**differences, **chords}, found.level)


def _above_chord(found: Resampled, agent: str, left: str, right: str) -> Interval:
    observed = _above_mixture(*(found.means[name][None] for name in (agent, left, right)))[0]
    draws = _above_mixture(found.draws[agent], found.draws[left], found.draws[right])
    return interval(observed, draws, found.level, found.run_error_of(agent))


def _above_mixture(agent: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Quality above the mixture of two methods that costs the same (D,); all are (quality, cost, ...) (D, measures)."""
    span = right[:, 1] - left[:, 1]
    share = np.divide(agent[:, 1] - left[:, 1], span, out=np.ones(len(span)), where=span > 0)
    share = np.clip(share, 0, 1)  # a replicate's cost may lie outside; a mixture has no negative shares
    return agent[:, 0] - (1 - share) * left[:, 0] - share * right[:, 0]
