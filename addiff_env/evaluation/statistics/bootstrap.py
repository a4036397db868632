"""Statistics on per-image rows: what a difference between methods is worth.

Prompts are the unit of sampling: pictures of one prompt (several seeds) stay together when prompts are resampled, so
they never count as independent evidence (cluster bootstrap; Davison & Hinkley 1997, section 3.8). Means are those of
pictures, as in every table: a prompt weighs by its number of pictures, and each replicate is the ratio of the resampled
sums. Rank tests and effect sizes take one value per prompt, the mean over its pictures. Agents
trained from several seeds are a second, crossed level: runs are resampled beside prompts (pigeonhole bootstrap, Owen
2007). With R runs the resampled spread of runs is (R-1)/R of the true one, so three or more runs are wanted.

Nothing here ever sees a summary: every function takes rows or per-prompt values. Everything is seeded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

MAX_CELLS = 1 << 22  # weights held at a time: bounds the memory of a bootstrap over 30,000 prompts


@dataclass(frozen=True)
class Interval:
    """An estimate with bootstrap bounds; ``draws`` are the bootstrap replicates (D,), kept for further questions."""

    estimate: float
    low: float
    high: float
    draws: np.ndarray
    run_error: float = 0.0  # the part of the standard error that further prompts do not shrink: between training runs

    @property
    def standard_error(self) -> float:
        """Standard deviation of the replicates."""
        return float(np.std(self.draws, ddof=1))

    def p_below(self, bound: float) -> float:
        """One-sided p-value of "the true value is at most ``bound``": the level at which ``low`` would reach it.

        It is the share of replicates on the far side (Efron & Tibshirani 1993, section 15.4), so that it never says
        other than the interval: at level 1 - 2 alpha ``low`` lies above ``bound`` just where p is at most alpha.
        """
        return tail_share(self.draws <= bound + self.rounding)

    def ceiling(self, critical: float) -> float:
        """Upper bound that holds together with others, see `critical_value`."""
        return self.estimate + critical * self.standard_error

    def negated(self) -> Interval:
        """The same of minus the value."""
        return replace(self, estimate=-self.estimate, low=-self.high, high=-self.low, draws=-self.draws)

    def p_two_sided(self) -> float:
        """Two-sided p-value of "the true value is zero": the interval at level 1 - p ends there."""
        return min(1.0, 2 * min(self.p_below(0.0), self.negated().p_below(0.0)))

    @property
    def rounding(self) -> float:
        """Means of counts often tie exactly; rounding must not decide on which side they fall."""
        return 1e-12 * (1 + abs(self.estimate))


def tail_share(extreme: np.ndarray) -> float:
    """Share of replicates at least as extreme; the observed one counts (Davison & Hinkley 1997, eq. 4.11)."""
    return (1 + int(extreme.sum())) / (1 + extreme.size)


def critical_value(found: Iterable[Interval], alpha: float) -> float:
    """Standard errors above their estimates at which upper bounds hold all at once, with probability 1 - alpha.

    The quantile of the largest studentised deviation (max-t; Romano & Wolf 2005), which knows how the estimates move
    together; all of them must come from the same replicates. 0.0 where nothing varies.
    """
    largest: np.ndarray | None = None
    for one in found:
        if one.standard_error > one.rounding:
            deviation = (one.estimate - one.draws) / one.standard_error  # (D,)
            largest = deviation if largest is None else np.maximum(largest, deviation)
    return 0.0 if largest is None else float(np.quantile(largest, 1 - alpha))


class TooFewReplicates(ValueError):
    """An interval at a level that the replicates cannot tell."""


def interval(estimate: float, draws: np.ndarray, level: float = 0.95, run_error: float = 0.0) -> Interval:
    """Percentile interval of replicates (D,): its ends are the (D + 1) alpha-th of them, from below and from above.

    Raises:
        ValueError: a level outside (0, 1).
        TooFewReplicates: more than the replicates can tell.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    number = math.floor((draws.size + 1) * (1 - level) / 2 + 1e-9)  # no interpolation: p-values count replicates too
    if number < 1:
        raise TooFewReplicates(f"{draws.size} replicates are too few for an interval at level {level:g}")
    ordered = np.partition(draws, [number - 1, draws.size - number])
    return Interval(float(estimate), float(ordered[number - 1]), float(ordered[-number]), draws, run_error)


# --------------------------------------------------------------------------- bootstrap


def mean_over_pictures(array: np.ndarray, pictures: np.ndarray | None = None) -> np.ndarray:
    """Mean over the last axis, prompts, each weighed by its number of ``pictures`` (prompts,); None: one each."""
    return np.asarray(np.average(array, axis=-1, weights=pictures))


def resampled_means(
    values: Mapping[str, np.ndarray], draws: int = 10_000, seed: int = 0, pictures: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Bootstrap means (draws, measures) of every group, all from the same resampled prompts.

    Args:
        values: per group (measures, runs, prompts), as `paired_values` gives them.
        draws: bootstrap replicates.
        seed: of the resampling.
        pictures: of each prompt (prompts,), by which it weighs; None: one each.

    Raises:
        ValueError: fewer than two prompts, groups with different prompts, or fewer than one draw.
    """
    numbers = {array.shape[-1] for array in values.values()}
    if len(numbers) != 1:
        raise ValueError(f"groups have different numbers of prompts: {sorted(numbers)}")
    (number,) = numbers
    if number < 2 or draws < 1:
        raise ValueError(f"a bootstrap needs two prompts and one draw, got {number} and {draws}")
    prompt_stream, run_stream = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    run_weights = {
        name: resampling_weights(run_stream, array.shape[1], draws)
        for name, array in values.items()
        if array.shape[1] > 1
    }
    chunks: dict[str, list[np.ndarray]] = {name: [] for name in values}
    for start, drawn in _weight_chunks(prompt_stream, number, draws):
        weights = drawn if pictures is None else drawn * pictures
        if pictures is not None:
            weights /= weights.sum(1, keepdims=True)
        for name, array in values.items():
            means = (weights @ array.reshape(-1, number).T).reshape(-1, *array.shape[:2])  # (D, measures, runs)
            chunks[name].append(_over_runs(means, run_weights.get(name), start))
    return {name: np.concatenate(parts) for name, parts in chunks.items()}


def _over_runs(means: np.ndarray, weights: np.ndarray | None, start: int) -> np.ndarray:
    """(D, measures, runs) to (D, measures)."""
    if weights is None:
        return means[..., 0]
    return np.einsum("dmr,dr->dm", means, weights[start : start + len(means)])


def resampling_weights(rng: np.random.Generator, number: int, draws: int) -> np.ndarray:
    """How often each of ``number`` units is drawn, as a share (draws, number)."""
    picked = rng.integers(number, size=(draws, number)) + number * np.arange(draws)[:, None]
    return np.bincount(picked.ravel(), minlength=draws * number).reshape(draws, number) / number


def _weight_chunks(rng: np.random.Generator, number: int, draws: int) -> Iterator[tuple[int, np.ndarray]]:
    size = max(1, MAX_CELLS // number)
    for start in range(0, draws, size):
        yield start, resampling_weights(rng, number, min(size, draws - start))


@dataclass(frozen=True)
class Resampled:
    """Means of several groups and measures, and their bootstrap replicates from the same resampled prompts.

    Whatever is asked of it, differences or distances, is paired and costs no further resampling.
    """

    means: Mapping[str, np.ndarray]  # per group (measures,)
    draws: Mapping[str, np.ndarray]  # per group (D, measures)
    level: float  # of the intervals
    runs: Mapping[str, np.ndarray] = field(default_factory=dict)  # per group means of its training runs (measures, R)

    def mean(self, name: str, measure: int = 0) -> Interval:
        """Mean of one group."""
        return self._combined({name: 1.0}, measure)

    def difference(self, a: str, b: str, measure: int = 0) -> Interval:
        """Mean of one group minus that of another."""
        return self._combined({a: 1.0, b: -1.0}, measure)

    def _combined(self, weights: Mapping[str, float], measure: int) -> Interval:
        observed = sum(weight * self.means[name][measure] for name, weight in weights.items())
        draws = np.sum([weight * self.draws[name][:, measure] for name, weight in weights.items()], axis=0)
        spread = math.hypot(*(weight * self.run_error_of(name, measure) for name, weight in weights.items()))
        return interval(observed, draws, self.level, spread)

    def run_error_of(self, name: str, measure: int = 0) -> float:
        """What the training runs add to the standard error of a group's mean, as the bootstrap sees it."""
        runs = self.runs.get(name)
        return 0.0 if runs is None else float(np.std(runs[measure]) / math.sqrt(runs.shape[1]))


def resample(
    values: Mapping[str, np.ndarray],
    *,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
    pictures: np.ndarray | None = None,
) -> Resampled:
    """Resample prompts (and runs) once for all groups and measures, see `resampled_means`."""
    runs = {name: mean_over_pictures(array, pictures) for name, array in values.items()}
    means = {name: array.mean(1) for name, array in runs.items()}
    return Resampled(means, resampled_means(values, draws, seed, pictures), level, runs)
