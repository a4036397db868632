"""AUC and the text-only probe against brute force."""

import numpy as np
import pytest

from addiff_env.tiny.auc import auc, auc_interval, probe


def test_auc_is_the_share_of_ordered_pairs(rng: np.random.Generator) -> None:
    scores, labels = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    assert auc(scores, labels) == pytest.approx(np.mean(pairs))
    low, high = auc_interval(scores, labels)
    assert low < auc(scores, labels) < high
    assert np.isnan(auc(scores, np.ones(60, bool)))


def test_probe_finds_what_is_there_and_nothing_else(rng: np.random.Generator) -> None:
    features = rng.normal(size=(400, 8))
    told = features[:, 0] + 0.3 * rng.normal(size=400) > 0
    assert auc(probe(features, told.astype(float)), told) > 0.9
    noise = rng.random(400) < 0.5
    assert abs(auc(probe(features, noise.astype(float)), noise) - 0.5) < 0.1  # out of fold: no memory
