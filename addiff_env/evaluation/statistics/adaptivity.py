"""H3's parts: rank correlation of NFE with complexity, over all prompts and among pictures of one seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from addiff_env.evaluation.statistics.bootstrap import Interval, TooFewReplicates, interval
from addiff_env.evaluation.statistics.correlation import partial_spearman, spearman_test
from addiff_env.evaluation.statistics.decision import (
    NOT_APPLICABLE,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDECIDED,
    ConditionTester,
    Part,
    Rules,
)
from addiff_env.types import ResultRow, SampleKey

NO_PARTIAL = "too few prompts share a seed to partial it out (it is independent of the prompt by design)"


def correlation_parts(level: np.ndarray, nfe: np.ndarray, rules: Rules) -> list[Part]:
    """Does NFE (runs, prompts) grow with complexity (prompts,)? By the bootstrap and against a permutation null."""
    try:
        found = spearman_test(level, nfe, level=rules.level, draws=rules.fewer(2000), seed=rules.seed)
    except TooFewReplicates as error:
        return [Part(f"NFE grows with complexity ({error})", UNDECIDED)]
    rho, p, tester = found.rho, found.p_permutation, ConditionTester(level.size, rules, len(nfe))
    bootstrap = tester.above("NFE grows with complexity", rho, 0.0, rules.correlation)
    outcome = SUPPORTED if p <= rules.alpha else NOT_SUPPORTED if bootstrap.outcome == NOT_SUPPORTED else UNDECIDED
    condition = "more than when complexities are dealt out at random"
    # The bootstrap's bounds belong to the other part: this one's p comes from another test and may differ from them.
    return [bootstrap, tester.needing(Part(condition, outcome, rho.estimate, p=p), rho, 0.0, rules.correlation)]


def partial_parts(rows: Sequence[ResultRow], complexity: Mapping[SampleKey, float], rules: Rules) -> list[Part]:
    """Does it among pictures that share a seed? Not applicable where too few do."""
    methods = list(dict.fromkeys(row.method for row in rows))
    places = {(row.prompt, row.seed): k for k, row in enumerate(row for row in rows if row.method == methods[0])}
    nfe = np.empty((len(methods), len(places)))
    for row in rows:
        nfe[methods.index(row.method), places[row.prompt, row.seed]] = row.nfe
    level = np.array([complexity[place] for place in places], float)
    seeds = np.array([seed for _, seed in places])
    prompts = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in places))}
    each = [partial_spearman(level, own, seeds) for own in nfe]
    if len(np.unique(seeds)) > len(prompts) / 2 or all(rho is None for rho in each):
        return [Part(NO_PARTIAL, NOT_APPLICABLE)]
    owner = np.array([prompts[prompt] for prompt, _ in places])
    rhos = np.array([rho or 0.0 for rho in each])  # a run that does the same for every picture adapts to none
    try:
        found = _resampled_partial(rhos, (level, nfe, seeds), owner, rules)
    except TooFewReplicates as error:
        return [Part(f"also among pictures of one seed ({error})", UNDECIDED)]
    tester = ConditionTester(len(prompts), rules, len(methods))
    return [tester.above("also among pictures of one seed", found, 0.0, rules.correlation)]


def _resampled_partial(
    rhos: np.ndarray, variables: tuple[np.ndarray, np.ndarray, np.ndarray], owner: np.ndarray, rules: Rules
) -> Interval:
    """Bootstrap over prompts, each with all its pictures, and over the training runs that ``rhos`` (runs,) are of."""
    rng, runs = np.random.default_rng([rules.seed, 3]), np.random.default_rng([rules.seed, 4])
    level, nfe, seeds = variables
    pictures = [np.flatnonzero(owner == k) for k in range(owner.max() + 1)]
    draws = []
    for _ in range(rules.fewer(500)):
        index = np.concatenate([pictures[k] for k in rng.integers(len(pictures), size=len(pictures))])
        drawn = runs.integers(len(nfe), size=len(nfe)) if len(nfe) > 1 else [0]
        values = [partial_spearman(level[index], nfe[run][index], seeds[index]) for run in drawn]
        if any(value is not None and np.isfinite(value) for value in values):
            draws.append(float(np.mean(np.nan_to_num(np.array(values, float)))))
    return interval(float(rhos.mean()), np.array(draws), rules.level, float(np.std(rhos) / math.sqrt(len(rhos))))
