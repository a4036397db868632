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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats

from addiff_env.evaluation.statistics.summary import score_value, scores_of
from addiff_env.types import ResultRow

__all__ = [
    "Comparison",
    "Interval",
    "Least",
    "Resampled",
    "TooFewReplicates",
    "bootstrap_difference",
    "cohens_dz",
    "compare_methods",
    "costs_of",
    "critical_value",
    "distance_to_front",
    "front_quality",
    "holm",
    "mcnemar_exact",
    "minimum_detectable_effect",
    "non_inferiority",
    "on_common_pictures",
    "paired_values",
    "partial_spearman",
    "picture_counts",
    "rank_biserial",
    "required_prompts",
    "required_runs",
    "resample",
    "resampled_means",
    "score_of",
    "spearman_test",
    "wilcoxon_p",
]

Measure = Callable[[ResultRow], float]
_CELLS = 1 << 22  # weights held at a time: bounds the memory of a bootstrap over 30,000 prompts


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
        return _tail(self.draws <= bound + self.rounding)

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


def _tail(extreme: np.ndarray) -> float:
    """Share of replicates at least as extreme; the observed one counts (Davison & Hinkley 1997, eq. 4.11)."""
    return (1 + int(extreme.sum())) / (1 + extreme.size)


@dataclass(frozen=True)
class Least:
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

    @property
    def standard_error(self) -> float:
        """Of the smallest difference."""
        return self.differences[self.nearest].standard_error

    @property
    def run_error(self) -> float:
        """Of the smallest difference."""
        return self.differences[self.nearest].run_error

    def ceiling(self, critical: float) -> float:
        """Upper bound that holds together with others, see `critical_value`."""
        return min(one.ceiling(critical) for one in self.differences.values())

    def p_below(self, bound: float) -> float:
        """One-sided p-value of "some difference is at most ``bound``"."""
        return max(one.p_below(bound) for one in self.differences.values())


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


# --------------------------------------------------------------------------- rows to paired values


def score_of(metric: str) -> Measure:
    """Read a metric off a row.

    The function raises ValueError where the row does not have it, naming the row and the metrics it has.
    """

    def read(row: ResultRow) -> float:
        if score_value(row, metric) is None:
            place = f"{row.method}, {row.prompt!r}, seed {row.seed}"
            raise ValueError(f"no {metric!r} in the row of ({place}); it has {sorted(scores_of(row))}")
        return row.scores[metric]

    return read


def costs_of(name: str) -> Measure:
    """Read a cost off a row: ``nfe``, ``net_flops``, ``forward_passes`` or ``seconds``.

    Raises:
        ValueError: another name.
    """
    known = ("nfe", "net_flops", "forward_passes", "seconds")
    if name not in known:
        raise ValueError(f"unknown cost {name!r}; known: {', '.join(known)}")
    return lambda row: float(getattr(row, name))


def paired_values(
    rows: Sequence[ResultRow], groups: Mapping[str, Sequence[str]] | Sequence[str], measures: Sequence[Measure]
) -> dict[str, np.ndarray]:
    """Per-prompt means of measures, float64 (measures, runs, prompts), the same prompts in the same order for each.

    Args:
        rows: per-image rows of all methods.
        groups: methods to read, or a mapping of a name to the methods that are its training runs, e.g.
            ``{"agent": ["agent-s0", "agent-s1"], "ddim-50": ["ddim-50"]}``.
        measures: what to read off each row, see `score_of` and `costs_of`.

    Raises:
        ValueError: no rows of a method, two rows of one picture, or pictures that only some methods made: pairs would
            not be pairs. The message names them.
    """
    if not isinstance(groups, Mapping):
        groups = {name: [name] for name in groups}
    methods = [method for runs in groups.values() for method in runs]
    tables = _tables(rows, methods)
    _refuse_unpaired(tables)
    places = list(next(iter(tables.values())))
    owner = _owners(prompt for prompt, _ in places)
    per_method = {m: _prompt_means([table[p] for p in places], owner, measures) for m, table in tables.items()}
    return {name: np.stack([per_method[m] for m in runs], axis=1) for name, runs in groups.items()}


def on_common_pictures(rows: Sequence[ResultRow], methods: Sequence[str]) -> tuple[list[ResultRow], list[str]]:
    """The rows on those pictures that all of ``methods`` have, and in words which method lacks how many."""
    own = {name: {(row.prompt, row.seed) for row in rows if row.method == name} for name in methods}
    everything = set().union(*own.values())
    common = everything.intersection(*own.values())
    notes = [
        f"{name} lacks {len(everything - places)} of {len(everything)} pictures, which are left out for all"
        for name, places in own.items()
        if places != everything
    ]
    return [row for row in rows if (row.prompt, row.seed) in common], notes


def picture_counts(rows: Sequence[ResultRow], method: str) -> np.ndarray:
    """Pictures of each prompt, int64 (prompts,), in the order of `paired_values` whose first method is ``method``.

    Raises:
        ValueError: as `paired_values`.
    """
    return np.bincount(_owners(prompt for prompt, _ in _tables(rows, [method])[method]))


def _owners(prompts: Iterable[str]) -> np.ndarray:
    """Which prompt each picture belongs to, numbered by first appearance (pictures,)."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts])


def _tables(rows: Sequence[ResultRow], methods: Sequence[str]) -> dict[str, dict[tuple[str, int], ResultRow]]:
    tables: dict[str, dict[tuple[str, int], ResultRow]] = {method: {} for method in methods}
    for row in rows:
        table = tables.get(row.method)
        if table is None:
            continue
        if (row.prompt, row.seed) in table:
            raise ValueError(f"two rows of {row.method!r} for {row.prompt!r}, seed {row.seed}")
        table[row.prompt, row.seed] = row
    empty = [method for method, table in tables.items() if not table]
    if empty:
        raise ValueError(f"no rows of {empty}; rows are of {sorted({row.method for row in rows})}")
    return tables


def _refuse_unpaired(tables: Mapping[str, Mapping[tuple[str, int], ResultRow]]) -> None:
    everything = dict.fromkeys(place for table in tables.values() for place in table)
    for method, table in tables.items():
        absent = [place for place in everything if place not in table]
        if absent:
            raise ValueError(
                f"{method!r} lacks {len(absent)} of {len(everything)} pictures that others made, e.g. {absent[0]}; "
                "only the same (prompt, seed) can be compared"
            )


def _prompt_means(rows: Sequence[ResultRow], owner: np.ndarray, measures: Sequence[Measure]) -> np.ndarray:
    """Means over each prompt's pictures, (measures, prompts)."""
    counts = np.bincount(owner)
    return np.stack([np.bincount(owner, [measure(row) for row in rows]) / counts for measure in measures])


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
        name: _weights(run_stream, array.shape[1], draws) for name, array in values.items() if array.shape[1] > 1
    }
    chunks: dict[str, list[np.ndarray]] = {name: [] for name in values}
    for start, drawn in _weight_chunks(prompt_stream, number, draws):
        weights = drawn if pictures is None else _normalised(drawn * pictures)
        for name, array in values.items():
            means = (weights @ array.reshape(-1, number).T).reshape(-1, *array.shape[:2])  # (D, measures, runs)
            chunks[name].append(_over_runs(means, run_weights.get(name), start))
    return {name: np.concatenate(parts) for name, parts in chunks.items()}


def _normalised(weights: np.ndarray) -> np.ndarray:
    """Rows (D, n) that add up to 1."""
    return np.asarray(weights / weights.sum(1, keepdims=True))


def _over_runs(means: np.ndarray, weights: np.ndarray | None, start: int) -> np.ndarray:
    """(D, measures, runs) to (D, measures)."""
    if weights is None:
        return means[..., 0]
    return np.einsum("dmr,dr->dm", means, weights[start : start + len(means)])


def _weights(rng: np.random.Generator, number: int, draws: int) -> np.ndarray:
    """How often each of ``number`` units is drawn, as a share (draws, number)."""
    picked = rng.integers(number, size=(draws, number)) + number * np.arange(draws)[:, None]
    return np.bincount(picked.ravel(), minlength=draws * number).reshape(draws, number) / number


def _weight_chunks(rng: np.random.Generator, number: int, draws: int) -> Iterator[tuple[int, np.ndarray]]:
    size = max(1, _CELLS // number)
    for start in range(0, draws, size):
        yield start, _weights(rng, number, min(size, draws - start))


def bootstrap_difference(
    a: np.ndarray, b: np.ndarray, *, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of ``a - b`` over prompts, paired; percentile interval.

    Args:
        a: per-prompt values (prompts,) or (runs, prompts).
        b: the same prompts of the other method; runs may differ in number, they are resampled apart.
        level: of the interval.
        draws: bootstrap replicates.
        seed: of the resampling.
    """
    a, b = np.atleast_2d(a), np.atleast_2d(b)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"not paired: {a.shape[-1]} and {b.shape[-1]} prompts")
    if len(a) == len(b) == 1:  # one column is enough, and its rounding is the smallest
        means = resampled_means({"difference": (a - b)[None]}, draws, seed)["difference"][:, 0]
    else:
        both = resampled_means({"a": a[None], "b": b[None]}, draws, seed)
        means = both["a"][:, 0] - both["b"][:, 0]
    return interval(float(a.mean() - b.mean()), means, level)


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
        spread = math.hypot(*(weight * self._run_error(name, measure) for name, weight in weights.items()))
        return interval(observed, draws, self.level, spread)

    def _run_error(self, name: str, measure: int) -> float:
        """What the training runs add to the standard error of a group's mean, as the bootstrap sees it."""
        runs = self.runs.get(name)
        return 0.0 if runs is None else float(np.std(runs[measure]) / math.sqrt(runs.shape[1]))

    def above_front(self, agent: str, front: Sequence[str]) -> Least:
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
        own = self.means[agent][1]
        cheap = [name for name in front if self.means[name][1] <= own]
        dear = [name for name in front if self.means[name][1] > own]
        chords = [(left, right) for left in cheap for right in dear]
        members = cheap or [min(front, key=lambda name: self.means[name][1])]
        found = {name: self.difference(agent, name) for name in members}
        found |= {f"{left} with {right}": self._above_chord(agent, left, right) for left, right in chords}
        return Least(found, self.level)

    def _above_chord(self, agent: str, left: str, right: str) -> Interval:
        observed = _above_chord(*(self.means[name][None] for name in (agent, left, right)))[0]
        draws = _above_chord(self.draws[agent], self.draws[left], self.draws[right])
        return interval(observed, draws, self.level, self._run_error(agent, 0))


def _above_chord(agent: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Quality above the mixture of two methods that costs the same (D,); all are (quality, cost, ...) (D, measures)."""
    span = right[:, 1] - left[:, 1]
    share = np.divide(agent[:, 1] - left[:, 1], span, out=np.ones(len(span)), where=span > 0)
    share = np.clip(share, 0, 1)  # a replicate's cost may lie outside; a mixture has no negative shares
    return agent[:, 0] - (1 - share) * left[:, 0] - share * right[:, 0]


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


# --------------------------------------------------------------------------- tests and effect sizes


def wilcoxon_p(differences: np.ndarray) -> float:
    """Two-sided Wilcoxon signed-rank test of per-prompt differences (Wilcoxon 1945, zeros after Pratt 1959).

    1.0 where nothing differs.
    """
    if not np.any(differences):
        return 1.0
    return float(stats.wilcoxon(differences, zero_method="pratt", method="approx").pvalue)


def mcnemar_exact(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided McNemar test of paired outcomes, 0 or 1 (McNemar 1947): a binomial test of the discordant pairs.

    Raises:
        ValueError: other values.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    strange = set(np.unique(np.concatenate([a, b]))) - {0.0, 1.0}
    if strange:
        raise ValueError(f"McNemar's test takes 0 and 1, got {sorted(strange)[:5]}")
    wins, losses = int(np.sum(a > b)), int(np.sum(a < b))
    return 1.0 if wins + losses == 0 else float(stats.binomtest(wins, wins + losses).pvalue)


def cohens_dz(differences: np.ndarray) -> float:
    """Paired Cohen's d: mean difference in standard deviations of the differences (Cohen 1988, section 2.3.5).

    0.0 where nothing differs, infinite where every prompt differs by the same amount.
    """
    mean, spread = float(np.mean(differences)), float(np.std(differences, ddof=1))
    if spread > 0:
        return mean / spread
    return 0.0 if mean == 0 else math.copysign(math.inf, mean)


def rank_biserial(differences: np.ndarray) -> float:
    """Matched-pairs rank-biserial correlation in [-1, 1]: favourable minus unfavourable share of ranks (Kerby 2014).

    Zero differences are left out; 0.0 where nothing differs.
    """
    kept = differences[differences != 0]
    if not kept.size:
        return 0.0
    ranks = stats.rankdata(np.abs(kept))
    return float((ranks * np.sign(kept)).sum() / ranks.sum())


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values that hold the family-wise error (Holm 1979), in the order given.

    Raises:
        ValueError: a value outside [0, 1].
    """
    p = np.asarray(p_values, float)
    if np.any(~((p >= 0) & (p <= 1))):
        raise ValueError(f"p-values must lie in [0, 1], got {list(p_values)}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()


def minimum_detectable_effect(
    spread: float, prompts: int, alpha: float = 0.05, power: float = 0.8, run_error: float = 0.0
) -> float:
    """Smallest true mean difference that a two-sided paired test finds with the power wanted.

    Args:
        spread: standard deviation of the per-prompt differences.
        prompts: number of prompts.
        alpha: level of the test.
        power: chance of finding it.
        run_error: what training runs add to the standard error, see `required_prompts`.
    """
    error = math.hypot(spread / math.sqrt(prompts), run_error)
    return float((stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)) * error)


def required_prompts(
    gap: float, standard_error: float, prompts: int, alpha: float = 0.05, power: float = 0.8, run_error: float = 0.0
) -> int | None:
    """Prompts that a one-sided test needs to tell a value from a bound ``gap`` away; None where no number would do.

    Args:
        gap: distance of the true value from the bound, positive.
        standard_error: of the estimate from ``prompts`` prompts; it falls with their square root.
        prompts: number of prompts measured.
        alpha: level of the test.
        power: chance of finding it.
        run_error: the part of ``standard_error`` that does not fall: what training runs differ by. More runs are
            needed where it alone is too large, see `required_runs`.
    """
    wanted = _wanted_error(gap, alpha, power)
    room = wanted**2 - run_error**2  # 0.0 also where the squares are too small for a float
    if wanted <= run_error or room <= 0:
        return None
    needed = prompts * (max(0.0, standard_error**2 - run_error**2) / room)
    return max(2, math.ceil(needed)) if math.isfinite(needed) else None


def required_runs(gap: float, run_error: float, runs: int, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Training runs that a one-sided test needs at the least, however many prompts; None where no number would do.

    Args:
        gap: distance of the true value from the bound, positive.
        run_error: what ``runs`` training runs add to the standard error; it falls with their square root. The
            bootstrap's is (R - 1)/R of the true variance, so that from few runs this number comes out low.
        runs: training runs measured.
        alpha: level of the test.
        power: chance of finding it.
    """
    wanted = _wanted_error(gap, alpha, power)
    ratio = run_error / wanted if wanted > 0 else math.inf
    needed = runs * (ratio * ratio)
    return math.floor(needed) + 1 if math.isfinite(needed) else None


def _wanted_error(gap: float, alpha: float, power: float) -> float:
    """Standard error at which a one-sided test finds ``gap`` with the power wanted; 0.0 where there is no gap."""
    return max(0.0, gap) / float(stats.norm.ppf(1 - alpha) + stats.norm.ppf(power))


def non_inferiority(
    a: np.ndarray, b: np.ndarray, margin: float, *, alpha: float = 0.05, draws: int = 10_000, seed: int = 0
) -> tuple[Interval, float]:
    """Is ``a`` worse than ``b`` by less than ``margin``? The difference with its interval at level 1 - 2 alpha, and p.

    The null hypothesis is mean(a - b) <= -margin; the interval's low end is the one-sided bound that decides.

    Raises:
        ValueError: a margin that is not positive.
    """
    if not margin > 0:
        raise ValueError(f"a non-inferiority margin must be positive, got {margin}")
    found = bootstrap_difference(a, b, level=1 - 2 * alpha, draws=draws, seed=seed)
    return found, found.p_below(-margin)


# --------------------------------------------------------------------------- comparisons


@dataclass(frozen=True)
class Comparison:
    """One method against another on one metric; differences are method minus baseline, paired.

    Means, intervals and what is detectable are of pictures; Wilcoxon and effect sizes take one value per prompt, of
    several training runs their mean: they speak of these runs alone.
    """

    metric: str
    method: str
    baseline: str
    prompts: int
    mean: float
    baseline_mean: float
    difference: float
    low: float  # 95% bootstrap interval of the difference
    high: float
    p_bootstrap: float
    p_wilcoxon: float
    cohens_dz: float
    rank_biserial: float
    minimum_detectable: float  # smallest difference found with power 0.8 by this many prompts, at the corrected level
    p_holm: float = math.nan  # of p_bootstrap, over every metric and method of the call; nan before that


def compare_methods(
    rows: Sequence[ResultRow],
    methods: Mapping[str, Sequence[str]] | Sequence[str],
    baselines: Sequence[str],
    metrics: Sequence[str],
    *,
    draws: int = 10_000,
    seed: int = 0,
) -> list[Comparison]:
    """Every method against every baseline on every metric, with Holm's correction over all of them.

    What is detectable is so at 5% over their number, the level that Holm's correction asks of the smallest p-value.

    Args:
        rows: per-image rows.
        methods: names, or names with their training runs, see `paired_values`. The bootstrap resamples runs; Wilcoxon
            and effect sizes take their mean per prompt.
        baselines: names.
        metrics: names of scores.
        draws: bootstrap replicates; more are drawn where so few could not make the smallest p-value, 2 / (draws + 1),
            a corrected one of 1%.
        seed: of the resampling.
    """
    named = methods if isinstance(methods, Mapping) else {name: [name] for name in methods}
    groups = {**{name: [name] for name in baselines}, **named}
    values = paired_values(rows, groups, [score_of(metric) for metric in metrics])
    pictures = picture_counts(rows, next(iter(groups.values()))[0])
    wanted = [
        ((k, metric), method, baseline)
        for k, metric in enumerate(metrics)
        for method in named
        for baseline in baselines
        if method != baseline
    ]
    resampled = resample(values, draws=max(draws, 200 * len(wanted)), seed=seed, pictures=pictures)
    found = [_compare(*names, values, resampled, pictures, 0.05 / len(wanted)) for names in wanted]
    corrected = holm([comparison.p_bootstrap for comparison in found])
    return [replace(comparison, p_holm=p) for comparison, p in zip(found, corrected, strict=True)]


def _compare(
    metric: tuple[int, str],
    method: str,
    baseline: str,
    values: Mapping[str, np.ndarray],
    resampled: Resampled,
    pictures: np.ndarray,
    alpha: float,
) -> Comparison:
    measure, name = metric
    difference = resampled.difference(method, baseline, measure)
    per_prompt = values[method][measure].mean(0) - values[baseline][measure].mean(0)
    return Comparison(
        metric=name,
        method=method,
        baseline=baseline,
        prompts=per_prompt.size,
        mean=float(resampled.means[method][measure]),
        baseline_mean=float(resampled.means[baseline][measure]),
        difference=difference.estimate,
        low=difference.low,
        high=difference.high,
        p_bootstrap=difference.p_two_sided(),
        p_wilcoxon=wilcoxon_p(per_prompt),
        cohens_dz=cohens_dz(per_prompt),
        rank_biserial=rank_biserial(per_prompt),
        minimum_detectable=minimum_detectable_effect(
            _spread(per_prompt, pictures), per_prompt.size, alpha, run_error=difference.run_error
        ),
    )


def _spread(differences: np.ndarray, pictures: np.ndarray) -> float:
    """What, over the root of the number of prompts, is the standard error of the mean over pictures (linearised).

    With as many pictures for every prompt it is the standard deviation of the differences.
    """
    share = pictures / pictures.mean()
    rests = share * (differences - mean_over_pictures(differences, pictures))
    return float(np.sqrt((rests**2).sum() / (len(rests) - 1)))


# --------------------------------------------------------------------------- rank correlation


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's correlation with a bootstrap interval and a one-sided permutation p-value of "not positive"."""

    rho: Interval
    p_permutation: float
    prompts: int


def spearman_test(
    x: np.ndarray, y: np.ndarray, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> RankCorrelation:
    """Spearman's rank correlation of per-prompt values x (prompts,) and y (prompts,) or (runs, prompts).

    Of several training runs it is the mean of each run's own, where one that does the same for every prompt has 0. The
    interval resamples prompts, and runs beside them (ranks are taken anew in each replicate; of a single run one in
    which a variable does not vary has none and is left out); the null distribution permutes x over prompts.

    Raises:
        ValueError: different lengths, fewer than four prompts, or a variable that does not vary.
    """
    x, y = np.asarray(x, float), np.atleast_2d(np.asarray(y, float))
    if x.shape != y.shape[1:] or x.size < 4:
        raise ValueError(f"Spearman's correlation needs two variables of four prompts, got {x.shape} and {y.shape[1:]}")
    if np.ptp(x) == 0 or np.ptp(y, axis=1).max() == 0:
        raise ValueError(f"no rank correlation: x varies by {np.ptp(x)}, y by {np.ptp(y, axis=1).max()}")
    prompts, null_stream, runs = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))
    ranks_x, ranks_y = stats.rankdata(x), stats.rankdata(y, axis=1)
    each = np.nan_to_num(_row_correlation(ranks_y, ranks_x[None]))  # (runs,)
    replicates = np.concatenate([_resampled_rho(prompts, runs, x, y, d) for d in _portions(y.size, draws)])
    null = np.concatenate([_permuted_rho(null_stream, ranks_x, ranks_y, d) for d in _portions(x.size, draws)])
    rho, run_error = float(each.mean()), float(np.std(each) / math.sqrt(len(each)))
    found = interval(rho, replicates[np.isfinite(replicates)], level, run_error)
    return RankCorrelation(found, _tail(null >= rho - 1e-12), x.size)


def _portions(number: int, draws: int) -> list[int]:
    size = max(1, _CELLS // number)
    return [min(size, draws - start) for start in range(0, draws, size)]


def _resampled_rho(
    prompts: np.random.Generator, runs: np.random.Generator, x: np.ndarray, y: np.ndarray, draws: int
) -> np.ndarray:
    index = prompts.integers(x.size, size=(draws, x.size))
    ranks = stats.rankdata(x[index], axis=1)
    each = np.stack([_row_correlation(ranks, stats.rankdata(run[index], axis=1)) for run in y], axis=1)  # (D, runs)
    return each[:, 0] if len(y) == 1 else (np.nan_to_num(each) * _weights(runs, len(y), draws)).sum(1)


def _permuted_rho(rng: np.random.Generator, ranks_x: np.ndarray, ranks_y: np.ndarray, draws: int) -> np.ndarray:
    shuffled = rng.permuted(np.broadcast_to(ranks_x, (draws, ranks_x.size)), axis=1)
    return np.mean([np.nan_to_num(_row_correlation(shuffled, run[None])) for run in ranks_y], axis=0)


def _row_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each row (D, n) with the same row, or the one row, of ``b``; nan where one is flat."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    scale = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.divide((a * b).sum(1), scale, out=np.full(len(a), np.nan), where=scale > 0)


def partial_spearman(x: np.ndarray, y: np.ndarray, group: np.ndarray) -> float | None:
    """Spearman's correlation of per-image values with a factor held constant, here the seed of the initial noise.

    Ranks are taken over everything, each group's mean rank is subtracted, and what remains is correlated: only pictures
    that share a seed are compared. None where no two pictures of different values share one, as nothing is left then.
    """
    _, member = np.unique(np.asarray(group), return_inverse=True)
    rests = [_within(stats.rankdata(values), member) for values in (x, y)]
    if min(float(np.abs(rest).max()) for rest in rests) < 1e-9:
        return None
    return float(_row_correlation(rests[0][None], rests[1][None])[0])


def _within(ranks: np.ndarray, member: np.ndarray) -> np.ndarray:
    return ranks - (np.bincount(member, ranks) / np.bincount(member))[member]


# --------------------------------------------------------------------------- the fixed-step front


def front_quality(costs: np.ndarray, qualities: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Quality of the interpolated Pareto front of fixed methods at each of D costs: (D,).

    The front is the upper concave envelope of the points: tossing a coin between two methods for each prompt reaches
    every point of their chord, so a chord is what fixed inference can do at that cost. Cheaper than every method, the
    cheapest one stands in, which favours the front; dearer than all, the best one does. The best of noisy points lies
    above the best true one on average: good for drawing, while tests take `Resampled.above_front`.

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


def distance_to_front(
    agent: np.ndarray,
    front: Mapping[str, np.ndarray],
    *,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Least:
    """How far the agent's quality lies above the front of fixed methods at the agent's own mean cost.

    Args:
        agent: per-prompt (quality, cost), (2, runs, prompts), as `paired_values` gives them.
        front: the same of each fixed method.
        level: of the intervals.
        draws: bootstrap replicates.
        seed: of the resampling.

    Raises:
        ValueError: no fixed method.
    """
    names = {f"front/{name}": array for name, array in front.items()}
    return resample({"agent": agent, **names}, level=level, draws=draws, seed=seed).above_front("agent", list(names))
