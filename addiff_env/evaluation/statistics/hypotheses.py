"""Verdicts from per-image rows: supported, not supported, or undecided with the sample size that would decide.

H1 to H4 ask what was asked; H2+, H4+ and H5 are stricter (`addiff_env.evaluation.statistics.tiers`).

Each hypothesis is a conjunction of parts, and each part is a one-sided test at level ``alpha``. A conjunction is
supported where every part is (an intersection-union test; Berger 1982), which needs no correction for their number; its
p-value is the largest of theirs. Hypotheses are corrected for one another afterwards, in `tiers`.
One part that is not supported refutes it; otherwise it is undecided, and the part that needs most prompts says
how many. What was not run leaves its part undecided: no number of prompts decides that.

A part is *not supported* only where the data speak against it: where even the favourable end of its interval falls
short. An interval that is merely wide is undecided. As one part is enough, these ends hold for all comparisons of a
hypothesis at once (`critical_value`), so that a true one is refuted with probability ``alpha`` at most, however many
methods it was compared with. (H3 is refuted by either of two correlations, each at ``alpha``.)

Means are those of pictures, as in the tables; prompts are what is resampled. H3's correlations take one value per
prompt.

All take per-image rows, the agent's training runs as method names, and rules: margins and levels. Fixed-step methods
of each solver are ``fronts`` or ``solvers``; ``spending`` is what is equal: net FLOPs, or another cost of the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from addiff_env.evaluation.statistics.adaptivity import correlation_parts, partial_parts
from addiff_env.evaluation.statistics.bootstrap import (
    Interval,
    Resampled,
    critical_value,
    mean_over_pictures,
)
from addiff_env.evaluation.statistics.decision import (
    NOT_SUPPORTED,
    UNDECIDED,
    ConditionTester,
    Decision,
    Part,
    Rules,
    conclude,
)
from addiff_env.evaluation.statistics.families import BEST_OF, LOOKING_RULES, SEARCHES, Groups, members_of
from addiff_env.evaluation.statistics.front import MinDifference, above_front
from addiff_env.evaluation.statistics.pairing import costs_of, paired_values, score_of
from addiff_env.evaluation.statistics.replicates import AGENT, read_paired, resample_means
from addiff_env.evaluation.statistics.spending import NET_FLOPS, Spending
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


def _one_solver(fronts: Groups) -> list[Part]:
    """What the null hypothesis of every fixed-step solver holds and nobody ran: a second one."""
    if len(fronts) > 1:
        return []
    return [Part(f"no other solver than {next(iter(fronts))} was run" if fronts else "no solver was run", UNDECIDED)]


def _reaching(part: Part, family: str, members: Sequence[str], found: Resampled, spending: Spending) -> Part:
    """A part about a front, undecided where the front does not reach the agent's cost (measure 1).

    Fixed inference that spends as much as the agent may be better than the most expensive method that was run,
    and one that spends as little worse than the cheapest.
    """
    own, costs = found.means[AGENT][1], [found.means[name][1] for name in members]
    words = ""
    if max(costs) < own and part.outcome != NOT_SUPPORTED:
        words = f"the front of {family} ends at {spending.text(max(costs))}, below the agent's {spending.text(own)}"
    if min(costs) > own and part.outcome == NOT_SUPPORTED:
        words = f"the front of {family} begins at {spending.text(min(costs))}, above the agent's {spending.text(own)}"
    if not words:
        return part
    return replace(part, condition=f"{part.condition} ({words})", outcome=UNDECIDED, p=None, required=None, runs=None)


# --------------------------------------------------------------------------- H1


def h1_efficiency(
    rows: Sequence[ResultRow],
    agent: Sequence[str],
    reference: str,
    fronts: Groups,
    rules: Rules = Rules(),  # noqa: B008 (frozen)
) -> Decision:
    """H1 as stated: the quality of 50-step inference at <= 30 mean NFE.

    Parts: mean NFE within ``max_nfe``; quality not inferior to the reference. A plain solver of fewer steps may do the
    same: those that do are noted, and whether the agent is better than they are at its compute is H2's question.

    ``reference`` is 50-step inference, e.g. ``ddim-50``.
    """
    groups = _flatten(agent, fronts, reference)
    if few := _too_few("H1", rows, agent):
        return few
    read = read_paired(rows, groups, [score_of(rules.metric), costs_of("nfe")], rules)
    found = resample_means(read, rules)
    spent, behind = found.mean(AGENT, 1), found.difference(AGENT, reference)
    tester = ConditionTester(read.prompts, rules, len(agent), critical_value([spent.negated(), behind], rules.alpha))
    equal = tester.above(f"quality not inferior to {reference}", behind, -rules.margin)
    also = [name for name in members_of(fronts) if name != reference and _meets_h1(found, name, reference, rules)]
    parts = [
        tester.at_most(f"mean NFE at most {rules.max_nfe:g}", spent, rules.max_nfe),
        replace(equal, note=f"as do {', '.join(also)}" if also else ""),
    ]
    return conclude("H1", tester.prompts, parts)


def _meets_h1(found: Resampled, name: str, reference: str, rules: Rules) -> bool:
    behind = found.difference(name, reference)
    return found.means[name][1] <= rules.max_nfe and behind.p_below(-rules.margin) <= rules.alpha


# --------------------------------------------------------------------------- above fronts: H2, H2+, H5


def h2_quality(
    rows: Sequence[ResultRow],
    agent: Sequence[str],
    fronts: Groups,
    rules: Rules = Rules(),  # noqa: B008 (frozen)
    spending: Spending = NET_FLOPS,
) -> Decision:
    """H2 as stated: at the agent's mean cost its quality lies above every front of fixed-step methods.

    The null hypothesis is every solver at every N: where a second solver was not run, or a front ends below the agent's
    cost, H2 can be refuted but not supported. The front over all solvers together is tested as well, since a mixture of
    two is fixed inference too.
    """
    families = {**fronts, "all fixed methods": members_of(fronts)} if len(fronts) > 1 else dict(fronts)
    return _above_fronts("H2", rows, agent, families, rules, _one_solver(fronts), spending)


def h2_search(
    rows: Sequence[ResultRow],
    agent: Sequence[str],
    solvers: Groups,
    searches: Groups,
    rules: Rules = Rules(),  # noqa: B008 (frozen)
    spending: Spending = NET_FLOPS,
) -> Decision:
    """H2+: at the agent's mean cost its quality lies also above best-of-N and inference-time search.

    ``searches`` are methods of each kind; where best-of-N or every other kind is missing, H2+ can be refuted but not
    supported. Fixed-step methods and they make the front of all methods.
    """
    families = {**searches, "all fixed and search methods": [*members_of(solvers), *members_of(searches)]}
    missing = [] if BEST_OF in searches else [Part("best-of-N was not run", UNDECIDED)]
    if not set(searches) - {BEST_OF}:
        missing.append(Part(f"no other search ({', '.join(SEARCHES.values())}) was run", UNDECIDED))
    return _above_fronts("H2+", rows, agent, families, rules, missing, spending)


def h5_learning(
    rows: Sequence[ResultRow],
    agent: Sequence[str],
    made_by_hand: Sequence[str],
    solvers: Groups,
    rules: Rules = Rules(),  # noqa: B008 (frozen)
    spending: Spending = NET_FLOPS,
) -> Decision:
    """H5: at the agent's mean cost its quality lies above the front of hand-made rules.

    These are the methods ``made_by_hand``, and fixed numbers of steps as the simplest: with them the front goes on
    where a tuned rule costs less than the agent. Without a rule that looks (`LOOKING_RULES`), H5 can be refuted but not
    supported.
    """
    looks = any(name.startswith(LOOKING_RULES) for name in made_by_hand)
    missing = [] if looks else [Part("no rule that looks (threshold:n:tau) was run", UNDECIDED)]
    families = {"hand-made rules": [*made_by_hand, *members_of(solvers)]}
    return _above_fronts("H5", rows, agent, families, rules, missing, spending)


def _above_fronts(
    hypothesis: str,
    rows: Sequence[ResultRow],
    agent: Sequence[str],
    families: Groups,
    rules: Rules,
    missing: Sequence[Part],
    spending: Spending,
) -> Decision:
    """Is the agent above the front of every family at its mean cost? ``missing``: what nobody ran."""
    groups = _flatten(agent, families)
    if few := _too_few(hypothesis, rows, agent):
        return few
    read = read_paired(rows, groups, [score_of(rules.metric), costs_of(spending.cost.name)], rules)
    found = spending.with_rounds(resample_means(read, rules), groups, rules)
    distances = {family: above_front(found, AGENT, members) for family, members in families.items()}
    critical = critical_value(_comparisons(distances.values()), rules.alpha)
    tester = ConditionTester(read.prompts, rules, len(agent), critical)
    parts = []
    for family, distance in distances.items():
        condition = f"above the front of {family} at equal {spending.cost.words}"
        part = tester.above(condition, distance, 0.0, rules.worthwhile)
        parts.append(_reaching(part, family, families[family], found, spending))
    return conclude(hypothesis, tester.prompts, [*parts, *missing])


# --------------------------------------------------------------------------- H3


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
    make complex prompts take longer. That part is not applicable then, and the others decide. Of several training runs
    the mean of their own correlations counts. ``complexity`` is that of every (prompt, seed): `Item.num_requirements`.

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
    return conclude("H3", prompts, correlation_parts(level, nfe, rules) + partial_parts(taken, complexity, rules))


# --------------------------------------------------------------------------- H4, H4+


def h4_refinement(
    rows: Sequence[ResultRow],
    refining: Sequence[str],
    controls: Sequence[str] | Groups,
    rules: Rules = Rules(),  # noqa: B008 (frozen)
    hypothesis: str = "H4",
) -> Decision:
    """H4 or H4+: refining regions beats the same NFE spent otherwise, as ``controls`` do.

    A control that spent less NFE than the agent is none, and leaves its part undecided.

    Args:
        rows: per-image rows.
        refining: the agent's training runs.
        controls: of H4, the agent's NFE spent on plain steps of the whole picture; of H4+, its decisions with
            ``mask=full``: method names, or names with the controls of each training run, in the order of ``refining``.
        rules: margins and levels.
        hypothesis: which of the two.

    Raises:
        ValueError: another number of controls than of training runs.
    """
    named = controls if isinstance(controls, Mapping) else {name: [name] for name in controls}
    _flatten(refining, named)
    if any(len(runs) not in (1, len(refining)) for runs in named.values()):
        raise ValueError(f"{len(refining)} training runs need as many controls each, got {dict(named)}")
    if few := _too_few(hypothesis, rows, refining):
        return few
    groups = {AGENT: list(refining), **named}
    read = read_paired(rows, groups, [score_of(rules.metric), costs_of("nfe")], rules)
    prompts = read.prompts
    if not any(row.method in set(refining) and Action.REFINE in row.actions for row in rows):
        return conclude(hypothesis, prompts, [Part("the agent refines (it never does)", NOT_SUPPORTED)])
    found = resample_means(read.against(), rules)
    spent = float(mean_over_pictures(read.values[AGENT][1], read.pictures).mean())
    gains = {name: found.mean(name) for name in named}
    tester = ConditionTester(prompts, rules, len(refining), critical_value(gains.values(), rules.alpha))
    parts = [tester.above(f"better than {name} at equal NFE", gains[name], 0.0, rules.worthwhile) for name in named]
    return conclude(
        hypothesis,
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
