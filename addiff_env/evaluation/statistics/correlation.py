"""Spearman's rank correlation of per-prompt values, with bootstrap intervals and a permutation test."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from addiff_env.evaluation.statistics.bootstrap import MAX_CELLS, Interval, interval, resampling_weights, tail_share


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's correlation with a bootstrap interval and a one-sided permutation p-value of "not positive"."""

    rho: Interval
    p_permutation: float


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
    return RankCorrelation(found, tail_share(null >= rho - 1e-12))


def _portions(number: int, draws: int) -> list[int]:
    size = max(1, MAX_CELLS // number)
    return [min(size, draws - start) for start in range(0, draws, size)]


def _resampled_rho(
    prompts: np.random.Generator, runs: np.random.Generator, x: np.ndarray, y: np.ndarray, draws: int
) -> np.ndarray:
    index = prompts.integers(x.size, size=(draws, x.size))
    ranks = stats.rankdata(x[index], axis=1)
    each = np.stack([_row_correlation(ranks, stats.rankdata(run[index], axis=1)) for run in y], axis=1)  # (D, runs)
    return each[:, 0] if len(y) == 1 else (np.nan_to_num(each) * resampling_weights(runs, len(y), draws)).sum(1)


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
