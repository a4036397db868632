"""Both tiers of hypotheses from any rows: each decided on the pictures that all of its methods have with the metric.

What was left out is said; a method that never has the metric leaves its part undecided, and so do fewer than ten
prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from addiff_env.evaluation.statistics.decision import NOT_APPLICABLE, UNDECIDED, Decision, Part, Rules, conclude
from addiff_env.evaluation.statistics.families import (
    CONTINUED,
    FIXED_STEP_SOLVERS,
    FULL_IMAGE,
    Groups,
    agent_runs,
    agent_runs_by_price,
    control_names,
    hand_made_rules,
    members_of,
    search_families,
    solver_fronts,
)
from addiff_env.evaluation.statistics.hypotheses import (
    h1_efficiency,
    h2_quality,
    h2_search,
    h3_adaptivity,
    h4_refinement,
    h5_learning,
)
from addiff_env.evaluation.statistics.pairing import on_common_pictures
from addiff_env.evaluation.statistics.spending import NET_FLOPS, Spending, at_seconds
from addiff_env.evaluation.statistics.summary import score_value
from addiff_env.evaluation.statistics.tiers import correct_within_tiers
from addiff_env.evaluation.statistics.timings import COMMAND, Timings
from addiff_env.types import ResultRow, SampleKey


def decide_all(
    rows: Sequence[ResultRow],
    complexity: Mapping[SampleKey, float],
    agent: Sequence[str] | None = None,
    rules: Rules = Rules(),  # noqa: B008 (frozen)
    refining: Sequence[str] | None = None,
) -> list[Decision]:
    """H1-H4, then H2+, H4+ and H5, as far as the rows allow; one whose methods are missing is undecided.

    P-values are corrected within each tier, see `correct_within_tiers`.

    Args:
        rows: per-image rows.
        complexity: of every (prompt, seed), e.g. `Item.num_requirements`.
        agent: the agent's training runs, as method names; by default `agent_runs` of the rows.
        rules: margins and levels.
        refining: the training runs that H4 and H4+ are about; by default all.

    Raises:
        ValueError: no rows of the agent.
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    runs = agent_runs(methods) if agent is None else list(agent)
    if not set(runs) & set(methods):
        raise ValueError(f"no rows of the agent ({', '.join(runs) or 'none was named'}); rows are of {methods}")
    refined = runs if refining is None else list(refining)
    found = [
        _h1(rows, runs, methods, rules),
        _h2(rows, runs, methods, rules),
        _h3_on_common(rows, runs, complexity, rules),
        _h4_on_common("H4", CONTINUED, rows, refined, rules),
        _h2_search(rows, runs, methods, rules),
        _h4_on_common("H4+", FULL_IMAGE, rows, refined, rules),
        _h5(rows, runs, methods, rules),
    ]
    return correct_within_tiers(found, rules)


def _h1(rows: Sequence[ResultRow], runs: Sequence[str], methods: Sequence[str], rules: Rules) -> Decision:
    wanted, solvers = _references(rows, runs), solver_fronts(methods)
    reference = next((name for name in wanted if name in methods), None)

    def h1(paired: Sequence[ResultRow], own: list[str], others: list[str]) -> Decision:
        if reference not in others:
            return _undecided("H1", f"50-step inference ({' or '.join(wanted)}) was not run", _prompts(paired))
        return h1_efficiency(paired, own, reference, _known(solvers, others), rules)

    compared = [*([reference] if reference else ()), *members_of(solvers)]
    return _on_common(h1, "H1", rows, runs, compared, rules)


def _h2(
    rows: Sequence[ResultRow],
    runs: Sequence[str],
    methods: Sequence[str],
    rules: Rules,
    spending: Spending = NET_FLOPS,
) -> Decision:
    solvers = solver_fronts(methods)

    def h2(paired: Sequence[ResultRow], own: list[str], others: list[str]) -> Decision:
        if not others:
            return _undecided("H2", "no solver was run", _prompts(paired))
        return h2_quality(paired, own, _known(solvers, others), rules, spending)

    return _on_common(h2, "H2", rows, runs, members_of(solvers), rules, spending)


def _h2_search(
    rows: Sequence[ResultRow],
    runs: Sequence[str],
    methods: Sequence[str],
    rules: Rules,
    spending: Spending = NET_FLOPS,
) -> Decision:
    solvers, searches = solver_fronts(methods), search_families(methods)

    def h2(paired: Sequence[ResultRow], own: list[str], others: list[str]) -> Decision:
        known = _known(searches, others)
        if not known:
            return _undecided("H2+", "neither best-of-N nor another search was run", _prompts(paired))
        return h2_search(paired, own, _known(solvers, others), known, rules, spending)

    return _on_common(h2, "H2+", rows, runs, [*members_of(solvers), *members_of(searches)], rules, spending)


def _h5(
    rows: Sequence[ResultRow],
    runs: Sequence[str],
    methods: Sequence[str],
    rules: Rules,
    spending: Spending = NET_FLOPS,
) -> Decision:
    solvers, by_hand = solver_fronts(methods), hand_made_rules(methods)

    def h5(paired: Sequence[ResultRow], own: list[str], others: list[str]) -> Decision:
        known = [name for name in by_hand if name in others]
        if not known:
            return _undecided("H5", "no hand-made rule was run", _prompts(paired))
        return h5_learning(paired, own, known, _known(solvers, others), rules, spending)

    return _on_common(h5, "H5", rows, runs, [*by_hand, *members_of(solvers)], rules, spending)


def _prompts(rows: Sequence[ResultRow]) -> int:
    return len({row.prompt for row in rows})


def _known(fronts: Groups, names: Sequence[str]) -> dict[str, list[str]]:
    """The fronts without the methods that ``names`` lack."""
    kept = {front: [name for name in members if name in names] for front, members in fronts.items()}
    return {front: members for front, members in kept.items() if members}


Decide = Callable[[Sequence[ResultRow], list[str], list[str]], Decision]  # rows, the agent's runs, other methods


def _on_common(
    decided: Decide,
    hypothesis: str,
    rows: Sequence[ResultRow],
    agent: Sequence[str],
    others: Sequence[str],
    rules: Rules,
    spending: Spending = NET_FLOPS,
) -> Decision:
    """What ``decided`` makes of the pictures that the agent and ``others`` have in common, with the rules' metric."""
    names = list(dict.fromkeys([*agent, *others]))
    scored = [row for row in rows if row.method not in names or score_value(row, rules.metric) is not None]
    measured = {row.method for row in scored}
    known = [row for row in scored if row.method not in names or getattr(row, spending.cost.name) is not None]
    having = {row.method for row in known}
    own = [name for name in agent if name in having]
    if not own:
        lacking = spending.cost.words if set(agent) & measured else rules.metric
        return _undecided(hypothesis, f"no picture of {' or '.join(agent)} has {lacking}", _prompts(rows))
    compared = [name for name in dict.fromkeys(others) if name in having]
    paired, notes = on_common_pictures(known, [*own, *compared])
    if not paired:
        return _undecided(hypothesis, f"its methods have no picture in common: {'; '.join(notes)}", 0)
    decision = decided(paired, own, compared)
    lacks = {name: spending.cost.words if name in measured else rules.metric for name in names if name not in having}
    mute = [Part(f"{name} has no {what}", UNDECIDED) for name, what in lacks.items()]
    return _noting(decision, mute, notes)


def _noting(decision: Decision, further: Sequence[Part], notes: Sequence[str]) -> Decision:
    """The decision with further parts, and with words on what was left out."""
    if further:
        known = decision.parts or (Part(decision.reason, decision.outcome),)
        decision = conclude(decision.hypothesis, decision.prompts, [*known, *further])
    return replace(decision, reason="; ".join([decision.reason, *notes]))


def _at_other_prices(
    rows: Sequence[ResultRow],
    agents: Sequence[str],
    decisions: Sequence[Decision],
    rules: Rules,
    spendings: Sequence[Spending] = (NET_FLOPS,),
) -> list[Decision]:
    """H2 at every further price that the agents were run at, by names that say it; corrected in the place of H2."""
    methods = list(dict.fromkeys(row.method for row in rows))
    found = []
    for price, runs in agent_runs_by_price(methods).items():
        if not set(runs) & set(agents):
            for spending in spendings:
                decision = _in_place(_h2(rows, runs, methods, rules, spending), decisions, rules)
                found.append(replace(decision, hypothesis=f"H2 at price {price}{_suffix(spending)}"))
    return found


def _suffix(spending: Spending) -> str:
    """How a hypothesis is called that is decided at another cost than net FLOPs."""
    return "" if spending is NET_FLOPS else f" at equal {spending.cost.words}"


def _in_place(decision: Decision, decisions: Sequence[Decision], rules: Rules) -> Decision:
    """The decision corrected within its tier, in the place of the one of its name."""
    others = [one for one in decisions if one.hypothesis != decision.hypothesis]
    return correct_within_tiers([decision, *others], rules)[0]


def _at_equal_seconds(
    rows: Sequence[ResultRow], runs: Sequence[str], decisions: Sequence[Decision], rules: Rules, timings: Timings | None
) -> list[Decision]:
    """H2, H2+ and H5 once more, at equal seconds; not applicable where the agent was not timed.

    Each is corrected within its tier in the place of the one at equal net FLOPs, which stays as it is.
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    absent = _why_no_seconds(rows, runs, timings)
    found = []
    for name, decided in (("H2", _h2), ("H2+", _h2_search), ("H5", _h5)):
        if timings is None or absent:
            decision = Decision(name, NOT_APPLICABLE, absent, _prompts(rows))
        else:
            decision = _in_place(decided(rows, runs, methods, rules, at_seconds(timings)), decisions, rules)
        found.append(replace(decision, hypothesis=f"{name} at equal seconds"))
    return found


def _why_no_seconds(rows: Sequence[ResultRow], runs: Sequence[str], timings: Timings | None) -> str:
    """Why nothing can be asked at equal seconds; empty where it can."""
    if timings is None:
        return f"no timings: `{COMMAND}` makes them"
    reasons = timings.why_untimed([row for row in rows if row.method in set(runs)])
    return "; ".join(f"{name} was not timed: {why}" for name, why in reasons.items())


def _h3_on_common(
    rows: Sequence[ResultRow], agent: Sequence[str], complexity: Mapping[SampleKey, float], rules: Rules
) -> Decision:
    """H3 on the pictures that all training runs have; it asks for no quality."""
    having = {row.method for row in rows}
    own = [name for name in agent if name in having]
    paired, notes = on_common_pictures(rows, own)
    if own and not paired:
        return _undecided("H3", f"the training runs have no picture in common: {'; '.join(notes)}", 0)
    lacking = [Part(f"{name} was not run", UNDECIDED) for name in agent if name not in having]
    return _noting(h3_adaptivity(paired, own, complexity, rules), lacking, notes)


def _h4_on_common(
    hypothesis: str, control: str, rows: Sequence[ResultRow], agent: Sequence[str], rules: Rules
) -> Decision:
    """H4 or H4+ with the ``control`` of each of the agent's training runs."""
    names = [control.replace("agent", run, 1) for run in agent]
    label = control if len(agent) != 1 else names[0]
    whole = {row.method for row in rows}

    def h4(paired: Sequence[ResultRow], own: list[str], others: list[str]) -> Decision:
        if not names or len(own) < len(agent) or set(others) != set(names):
            return _undecided(hypothesis, f"its control ({label}) was not run", _prompts(paired))
        return h4_refinement(paired, own, {label: names}, rules, hypothesis)

    return _on_common(h4, hypothesis, rows, agent, names if set(names) <= whole else (), rules)


def decide(
    rows: Sequence[ResultRow],
    complexity: Mapping[SampleKey, float],
    rules: Rules = Rules(),  # noqa: B008 (frozen)
    agents: Sequence[str] = ("agent",),
    timings: Timings | None = None,
) -> list[Decision]:
    """Verdicts of both tiers from any rows; none without rows of ``agents``, which are training runs of one group.

    Of several the first alone has controls, so that H4 and H4+ are about that one. H2 is decided at every further price
    that they were run at, too, as if the agent had been run at that one alone. With ``timings`` H2, H2+ and H5 are
    decided at equal seconds as well, in verdicts of their own.
    """
    if not {row.method for row in rows} & set(agents):
        return []
    refining = agents[:1] if set(control_names(agents[0])) & {row.method for row in rows} else agents
    timed = list(rows) if timings is None else timings.onto(rows)
    decisions = decide_all(timed, complexity, agents, rules, refining)
    spendings = [NET_FLOPS, *([] if timings is None else [at_seconds(timings)])]
    return [
        *decisions,
        *_at_other_prices(timed, agents, decisions, rules, spendings),
        *_at_equal_seconds(timed, agents, decisions, rules, timings),
    ]


def _references(rows: Sequence[ResultRow], agent: Sequence[str]) -> list[str]:
    """Names of 50-step inference: by the environment's own solver (a row's, such as ``euler-4``), and by DDIM."""
    own = [row.solver.rpartition("-")[0] for row in rows if row.method in set(agent)]
    return list(dict.fromkeys([f"{solver}-50" for solver in own if solver in FIXED_STEP_SOLVERS] + ["ddim-50"]))


def _undecided(hypothesis: str, reason: str, prompts: int) -> Decision:
    return Decision(hypothesis, UNDECIDED, reason, prompts)
