"""One method against others on every metric: paired differences, tests and effect sizes, corrected together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from addiff_env.evaluation.statistics.bootstrap import Resampled, mean_over_pictures, resample
from addiff_env.evaluation.statistics.pairing import paired_values, picture_counts, score_of
from addiff_env.evaluation.statistics.power import minimum_detectable_effect
from addiff_env.types import ResultRow


def wilcoxon_p(differences: np.ndarray) -> float:
    """Two-sided Wilcoxon signed-rank test of per-prompt differences (Wilcoxon 1945, zeros after Pratt 1959).

    1.0 where nothing differs.
    """
    if not np.any(differences):
        return 1.0
    return float(stats.wilcoxon(differences, zero_method="pratt", method="approx").pvalue)


def cohens_dz(differences: np.ndarray) -> float:
    """Paired Cohen's d: mean difference in standard deviations of the differences (Cohen 1988, section 2.3.5).

    0.0 where nothing differs, infinite where every prompt differs by the same amount.
    """
    mean, spread = float(np.mean(differences)), float(np.std(differences, ddof=1))
    if spread > 1e-12 * np.abs(differences).max():  # else it is rounding
        return mean / spread
    return 0.0 if mean == 0 else math.copysign(math.inf, mean)


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
    minimum_detectable: float  # smallest difference found with power 0.8 by this many prompts, at the corrected level
    p_holm: float = math.nan  # of p_bootstrap, over every metric and method of the call; nan before that


def compare_methods(
    rows: Sequence[ResultRow],
    methods: Mapping[str, Sequence[str]] | Sequence[str],
    baselines: Sequence[str],
    metrics: Sequence[str],
    *,
    draws: int = 10_000,
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
    """
    named = methods if isinstance(methods, Mapping) else {name: [name] for name in methods}
    groups = {**{name: [name] for name in baselines}, **named}
    values = paired_values(rows, groups, [score_of(metric) for metric in metrics])
    pictures = picture_counts(rows, groups)
    wanted = [
        ((k, metric), method, baseline)
        for k, metric in enumerate(metrics)
        for method in named
        for baseline in baselines
        if method != baseline
    ]
    resampled = resample(values, draws=max(draws, 200 * len(wanted)), pictures=pictures)
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
    per_prompt = _settled(*(values[one][measure].mean(0) for one in (method, baseline)))
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
        minimum_detectable=minimum_detectable_effect(
            _spread(per_prompt, pictures), per_prompt.size, alpha, run_error=difference.run_error
        ),
    )


def _settled(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Differences (prompts,) without rounding: what is equal differs by exactly nothing, and ties are ties."""
    unit = 1e-12 * (1 + np.abs(theirs).max())
    return np.rint((ours - theirs) / unit) * unit


def _spread(differences: np.ndarray, pictures: np.ndarray) -> float:
    """What, over the root of the number of prompts, is the standard error of the mean over pictures (linearised).

    With as many pictures for every prompt it is the standard deviation of the differences.
    """
    share = pictures / pictures.mean()
    rests = share * (differences - mean_over_pictures(differences, pictures))
    return float(np.sqrt((rests**2).sum() / (len(rests) - 1)))
