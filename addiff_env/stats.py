"""Numbers that several layers need."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit
from scipy.stats import rankdata

Z95 = 1.959964  # standard normal quantile of a two-sided 95% interval


def wilson_interval(successes: float, number: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), 95% by default; counts may be effective ones, also below 1.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not number > 0 or not 0 <= successes <= number:
        raise ValueError(f"no share of {successes} in {number}")
    share, spread = successes / number, z * z / number
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / number + spread / (4 * number)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered_wilson(values: Sequence[float], clusters: Sequence[str]) -> tuple[float, float]:
    """95% Wilson interval of the mean of outcomes 0 or 1 that come in clusters, e.g. pictures of one prompt.

    Raises:
        ValueError: no outcomes.
    """
    _, owner = np.unique(np.asarray(clusters), return_inverse=True)
    size = effective_size(np.asarray(values, float), owner)
    return wilson_interval(float(np.mean(values)) * size, size)


def effective_size(values: np.ndarray, owner: np.ndarray) -> float:
    """How many independent outcomes 0 or 1 tell as much of their share as these clustered ones do.

    Their number over the design effect (the clustered variance of the mean over p(1 - p)/n; Kish 1965), which is never
    taken to be below 1, and over the ratio of squared t quantiles that few clusters cost (Korn & Graubard 1998). Where
    every outcome is the same their variance says nothing of how alike a cluster's are, and where there is but one
    cluster nothing does: they are taken to be copies then. Of two or three clusters that disagree it may be less than
    one outcome: they tell next to nothing.

    Args:
        values: outcomes (n,).
        owner: number of each one's cluster (n,), counted from 0.

    Raises:
        ValueError: no outcomes.
    """
    number = values.size
    if not number:
        raise ValueError("no share of no outcomes")
    sizes = np.bincount(owner)
    share, clusters = float(values.mean()), np.count_nonzero(sizes)
    if clusters == number:
        return float(number)
    if clusters < 2 or share in (0, 1):
        return float(number**2 / (sizes**2).sum())
    sums = np.bincount(owner, values - share)
    effect = (sums**2).sum() * clusters / (clusters - 1) / (number * share * (1 - share))
    few = (stdtrit(number - 1, 0.975) / stdtrit(clusters - 1, 0.975)) ** 2
    return float(number / max(1.0, effect) * few)


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a satisfied picture outscores a failed one, ties counting half.

    NaN where one of the classes is empty (Hanley & McNeil 1982), or a score is NaN.
    """
    positive = labels.astype(bool)
    number, rest = int(positive.sum()), int((~positive).sum())
    if number == 0 or rest == 0 or np.isnan(scores).any():
        return math.nan
    return float((rankdata(scores)[positive].sum() - number * (number + 1) / 2) / (number * rest))


def auc_interval(scores: np.ndarray, labels: np.ndarray, draws: int = 500, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of `auc` over pictures, those replicates left out that lack a class; NaN as `auc`."""
    if math.isnan(auc(scores, labels)):
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    index = rng.integers(len(labels), size=(draws, len(labels)))
    values = np.array([auc(scores[rows], labels[rows]) for rows in index])
    low, high = np.quantile(values[~np.isnan(values)], [0.025, 0.975])  # half of them at least have both
    return float(low), float(high)


def spread(items: Sequence[Any], number: int) -> list[Any]:
    """``number`` of ``items`` (or all, if fewer), evenly spaced."""
    at = np.linspace(0, len(items) - 1, min(number, len(items))).round().astype(int)
    return [items[index] for index in at]


def at_least_one(text: str) -> int:
    """A number of things, from a command line; raises argparse.ArgumentTypeError where it is none."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
