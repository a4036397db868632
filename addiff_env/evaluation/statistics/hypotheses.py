"""Verdicts on H1-H4 from per-image rows: supported, not supported, or undecided with the sample size that would decide.

Each hypothesis is a conjunction of parts, and each part is a one-sided test at level ``alpha``. A conjunction is
supported where every part is (an intersection-union test; Berger 1982), which needs no correction for their number.
One part that is not supported refutes it; otherwise it is undecided, and the part that needs most prompts says
how many. What was not run leaves its part undecided: no number of prompts decides that.

A part is *not supported* only where the data speak against it: where even the favourable end of its interval falls
short. An interval that is merely wide is undecided. As one part is enough, these ends hold for all comparisons of a
hypothesis at once (`critical_value`), so that a true one is refuted with probability ``alpha`` at most, however many
methods it was compared with. (H3 is refuted by either of two correlations, each at ``alpha``.)

Means are those of pictures, as in the tables; prompts are what is resampled. H3's correlations take one value per
prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from addiff_env.evaluation.statistics.bootstrap import (
    Interval,
    Resampled,
    TooFewReplicates,
    critical_value,
    interval,
    mean_over_pictures,
)
from addiff_env.evaluation.statistics.correlation import partial_spearman, spearman_test
from addiff_env.evaluation.statistics.decision import (
    NOT_APPLICABLE,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDECIDED,
    ConditionTester,
    Decision,
    Part,
    Rules,
    conclude,
)
from addiff_env.evaluation.statistics.families import BEST_OF, Groups, members_of
from addiff_env.evaluation.statistics.front import MinDifference, above_front
from addiff_env.evaluation.statistics.pairing import costs_of, paired_values, score_of
from addiff_env.evaluation.statistics.replicates import AGENT, read_paired, resample_means
from addiff_env.types import Action, ResultRow, SampleKey

LEAST_PROMPTS = 10  # with fewer the percentile bootstrap is far from its level


def _too_few(hypothesis: str, rows: Sequence[ResultRow], agent: Sequence[str]) -> Decision | None:
    """The decision where there are not enough prompts to resample."""
    prompts = len({row.prompt for row in rows if row.method in set(agent)})
    if prompts >= LEAST_PROMPTS or not prompts:  # rows of nobody are refused where they are read
        return None
    return conclude(hypothesis, prompts, [Part(f"a bootstrap needs {LEAST_PROMPTS} prompts, got {prompts}", UNDECIDED)])


def _flatten(agent: Sequence[str], fronts: Groups, *others: str) -> dict[str, list[str]]:
    """Groups to read: the agent's training runs, and every other method by itself."""
    names = dict.fromkeys([*(name for members in fronts.values() for name in members), *others])
    if not agent or not all(fronts.values()):
        raise ValueError(f"the agent and every front need a method, got {list(agent)} and {dict(fronts)}")
    overlap = sorted(set(agent) & set(names))
    if overlap:
        raise ValueError(f"{overlap} cannot be the agent and its baseline")
    return {AGENT: list(agent), **{name: [name] for name in names}}


def _comparisons(found: Iterable[Interval | MinDifference]) -> list[Interval]:
    """Every single comparison, for `critical_value`."""
    parts = [list(one.differences.values()) if isinstance(one, MinDifference) else [one] for one in found]
    return [one for part in parts for one in part]


def _not_run(fronts: Groups, best_of: bool) -> list[Part]:
    """Families that the null hypothesis needs and the run lacks: solvers' fronts, and best-of-N where it is part."""
    solvers = [name for name in fronts if name != BEST_OF]
    parts = []
    if len(solvers) < 2:
        other = f"no other solver than {solvers[0]} was run" if solvers else "no solver was run"
        parts.append(Part(other, UNDECIDED))
    if best_of and BEST_OF not in fronts:
        parts.append(Part("best-of-N was not run", UNDECIDED))
    return parts


def _reaching(part: Part, family: str, members: Sequence[str], found: Resampled) -> Part:
    """A part about a front, undecided where the front does not reach the agent's net FLOPs (measure 1).

    Fixed inference that spends as much as the agent may be better than the dearest method that was run, and one that
    spends as little worse than the cheapest.
    """
    own, costs = found.means[AGENT][1], [found.means[name][1] for name in members]
    words = ""
    if max(costs) < own and part.outcome != NOT_SUPPORTED:
        words = f"the front of {family} ends at {max(costs) / 1e9:.1f} GFLOPs, below the agent's {own / 1e9:.1f}"
    if min(costs) > own and part.outcome == NOT_SUPPORTED:
        words = f"the front of {family} begins at {min(costs) / 1e9:.1f} GFLOPs, above the agent's {own / 1e9:.1f}"
    if not words:
        return part
    return replace(part, condition=f"{part.condition} ({words})", outcome=UNDECIDED, required=None, runs=None)


# --------------------------------------------------------------------------- H1


def h1_efficiency(
    rows: Sequence[ResultRow],
    agent: Sequence[str],
    reference: str,
    fronts: Groups,
    rules: Rules = Rules(),  # noqa: B008 (frozen)
) -> Decision:
    """H1: the quality of 50-step inference at <= 30 mean NFE, which fixed inference does not have at that compute.

    Parts: mean NFE within ``max_nfe``; quality not inferior to the reference; at the agent's net FLOPs quality not
    inferior to any solver's interpolated front, of at least two solvers; and better than every fixed-step method that
    costs no more net FLOPs, which is not supported where the agent is surely less than ``margin`` better. Without the
    last part a plain 25-step solver "supports" H1, as in the published prototype. Which methods cost no more is read
    off the mean net FLOPs as they are, though the agent's is an estimate: one whose cost is hardly the agent's may get
    a part by chance, or miss one. The fronts then still hold it.

    Args:
        rows: per-image rows.
        agent: the agent's training runs, as method names.
        reference: 50-step inference, e.g. ``ddim-50``.
        fronts: fixed-step methods of each solver.
        rules: margins and levels.
    """
    groups = _flatten(agent, fronts, reference)
    if few := _too_few("H1", rows, agent):
        return few
    read = read_paired(rows, groups, [score_of(rules.metric), costs_of("net_flops"), costs_of("nfe")], rules)
    found = resample_means(read, rules)
    spent, behind = found.mean(AGENT, 2), found.difference(AGENT, reference)
    distances = {solver: above_front(found, AGENT, members) for solver, members in fronts.items()}
    cheaper = [name for name in members_of(fronts) if found.means[name][1] <= found.means[AGENT][1]]
    rivals = {name: found.difference(AGENT, name) for name in cheaper}
    everything = _comparisons([spent.negated(), behind, *distances.values(), *rivals.values()])
    tester = ConditionTester(read.prompts, rules, len(agent), critical_value(everything, rules.alpha))
    parts = [
        tester.at_most(f"mean NFE at most {rules.max_nfe:g}", spent, rules.max_nfe),
        tester.above(f"quality not inferior to {reference}", behind, -rules.margin),
    ]
    for solver, distance in distances.items():
        condition = f"not inferior to the front of {solver} at equal net FLOPs"
        parts.append(_reaching(tester.above(condition, distance, -rules.margin), solver, fronts[solver], found))
    for name, rival in rivals.items():
        parts.append(tester.above(f"better than {name}, which costs no more", rival, 0.0, rules.margin))
    return conclude("H1", tester.prompts, [*parts, *_not_run(fronts, best_of=False)])


# --------------------------------------------------------------------------- H2


def h2_quality(
    rows: Sequence[ResultRow],
    agent: Sequence[str],
    fronts: Groups,
    rules: Rules = Rules(),  # noqa: B008 (frozen)
) -> Decision:
    """H2: at the agent's mean net FLOPs its quality lies above every interpolated front.

    The null hypothesis is every solver at every N, and best-of-N: where a second solver or best-of-N was not run, or a
    front ends below the agent's cost, H2 can be refuted but not supported.

    Args:
        rows: per-image rows.
        agent: the agent's training runs, as method names.
        fronts: methods of each solver, and of best-of-N; the front over all of them together is tested as well, since
            a mixture of two solvers is fixed inference too.
        rules: margins and levels.
    """
    groups = _flatten(agent, fronts)
    if few := _too_few("H2", rows, agent):
        return few
    read = read_paired(rows, groups, [score_of(rules.metric), costs_of("net_flops")], rules)
    found = resample_means(read, rules)
    families = {**fronts, "all fixed methods": members_of(fronts)} if len(fronts) > 1 else dict(fronts)
    distances = {family: above_front(found, AGENT, members) for family, members in families.items()}
    critical = critical_value(_comparisons(distances.values()), rules.alpha)
    tester = ConditionTester(read.prompts, rules, len(agent), critical)
    parts = []
    for family, distance in distances.items():
        condition = f"above the front of {family} at equal net FLOPs"
        part = tester.above(condition, distance, 0.0, rules.worthwhile)
        parts.append(_reaching(part, family, families[family], found))
    return conclude("H2", tester.prompts, [*parts, *_not_run(fronts, best_of=True)])


# --------------------------------------------------------------------------- H3


NO_PARTIAL = "too few prompts share a seed to partial it out (it is independent of the prompt by design)"


def h3_adaptivity(
    rows: Sequence[ResultRow],
    agent: Sequence[str],
    complexity: Mapping[SampleKey, float],
    rules: Rules = Rules(),  # noqa: B008 (frozen)
) -> Decision:
    """H3: complex prompts get more denoiser evaluations than simple ones.

    Parts: Spearman's correlation of a prompt's mean NFE with its complexity is positive by the bootstrap and against a
    permutation null; and it stays so among pictures that share a seed. Where every prompt has seeds of its own nothing
    can be held constant, and nothing need be: seeds are dealt out without a look at the prompt, so that no seed can
    make complex prompts take longer. That part is not applicable then, and the others decide.

    Args:
        rows: per-image rows.
        agent: the agent's training runs, as method names; the mean of their own correlations counts.
        complexity: of every (prompt, seed), e.g. `Item.num_requirements`.
        rules: margins and levels.

    Raises:
        ValueError: a picture without a complexity.
    """
    taken = [row for row in rows if row.method in set(agent)]
    unknown = [(row.prompt, row.seed) for row in taken if (row.prompt, row.seed) not in complexity]
    if unknown:
        raise ValueError(f"no complexity of {len(unknown)} pictures, e.g. {unknown[0]}")
    measures = [costs_of("nfe"), lambda row: complexity[row.prompt, row.seed]]
    nfe, levels = paired_values(rows, {AGENT: agent}, measures)[AGENT]  # (runs, prompts) both
    level, prompts = levels[0], levels.shape[1]
    if few := _too_few("H3", rows, agent):
        return few
    if np.ptp(level) == 0:
        alike = f"every prompt has complexity {level[0]:g}: nothing to adapt to"
        return conclude("H3", prompts, [Part(alike, UNDECIDED)])
    if np.ptp(nfe, axis=1).max() == 0:
        return conclude("H3", prompts, [Part(f"NFE varies (it is {nfe[0, 0]:g} for every prompt)", NOT_SUPPORTED)])
    return conclude("H3", prompts, _correlation_parts(level, nfe, rules) + _partial_parts(taken, complexity, rules))


def _correlation_parts(level: np.ndarray, nfe: np.ndarray, rules: Rules) -> list[Part]:
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


def _partial_parts(rows: Sequence[ResultRow], complexity: Mapping[SampleKey, float], rules: Rules) -> list[Part]:
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


# --------------------------------------------------------------------------- H4


def h4_refinement(
    rows: Sequence[ResultRow],
    refining: Sequence[str],
    controls: Sequence[str] | Groups,
    rules: Rules = Rules(),  # noqa: B008 (frozen)
) -> Decision:
    """H4: refining regions beats the same NFE spent on full-image steps.

    A control that spent less NFE than the agent is none, and leaves its part undecided.

    Args:
        rows: per-image rows.
        refining: the agent's training runs, as method names.
        controls: the same decisions with ``mask=full``, and with further continues instead of refinements: method
            names, or names with the controls of each training run, in the order of ``refining``.
        rules: margins and levels.

    Raises:
        ValueError: another number of controls than of training runs.
    """
    named = controls if isinstance(controls, Mapping) else {name: [name] for name in controls}
    _flatten(refining, named)
    if any(len(runs) not in (1, len(refining)) for runs in named.values()):
        raise ValueError(f"{len(refining)} training runs need as many controls each, got {dict(named)}")
    if few := _too_few("H4", rows, refining):
        return few
    groups = {AGENT: list(refining), **named}
    read = read_paired(rows, groups, [score_of(rules.metric), costs_of("nfe")], rules)
    prompts = read.prompts
    if not any(row.method in set(refining) and Action.REFINE in row.actions for row in rows):
        return conclude("H4", prompts, [Part("the agent refines (it never does)", NOT_SUPPORTED)])
    found = resample_means(read.against(), rules)
    spent = float(mean_over_pictures(read.values[AGENT][1], read.pictures).mean())
    gains = {name: found.mean(name) for name in named}
    tester = ConditionTester(prompts, rules, len(refining), critical_value(gains.values(), rules.alpha))
    parts = [tester.above(f"better than {name} at equal NFE", gains[name], 0.0, rules.worthwhile) for name in named]
    return conclude(
        "H4",
        prompts,
        [
            _matched(part, spent, float(found.means[name][1]), name, rules)
            for part, name in zip(parts, named, strict=True)
        ],
    )


def _matched(part: Part, wanted: float, more: float, name: str, rules: Rules) -> Part:
    """The part, undecided where the control spent less: the agent spent ``wanted`` NFE, ``more`` than the control."""
    spent = wanted - more
    if spent >= wanted * (1 - rules.matched):
        return part
    words = (
        f"control {name!r} spent {spent:.2f} NFE where refining spent {wanted:.2f}: not the same compute "
        f"(allowed: {100 * rules.matched:g}% less)"
    )
    return Part(words, UNDECIDED)
