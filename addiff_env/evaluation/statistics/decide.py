"""Both tiers of hypotheses from any rows: each decided on the pictures that all of its methods have with the metric.

What was left out is said; a method that never has the metric leaves its part undecided, and so do fewer than ten
prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
from addiff_env.evaluation.statistics.summary import by_method, score_value
from addiff_env.evaluation.statistics.tiers import correct_within_tiers
from addiff_env.evaluation.statistics.timings import COMMAND, Timings
from addiff_env.types import ResultRow, SampleKey


@dataclass(frozen=True)
class Asked:
    """What a hypothesis is asked of.

    Attributes:
        rows: per-image rows.
        runs: the agent's training runs, as method names.
        rules: margins and levels.
        spending: what "equal compute" is measured in.
    """

    rows: Sequence[ResultRow]
    runs: Sequence[str]
    rules: Rules
    spending: Spending = NET_FLOPS

    @property
    def methods(self) -> list[str]:
        """Methods of the rows, in order of first appearance."""
        return list(by_method(self.rows))


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
    methods = list(by_method(rows))
    runs = agent_runs(methods) if agent is None else list(agent)
    if not set(runs) & set(methods):
        raise ValueError(f"no rows of the agent ({', '.join(runs) or 'none was named'}); rows are of {methods}")
    asked, refined = Asked(rows, runs, rules), Asked(rows, runs if refining is None else list(refining), rules)
    found = [
        _h1(asked),
        _h2(asked),
        _h3_on_common(asked, complexity),
        _h4_on_common("H4", CONTINUED, refined),
        _h2_search(asked),
        _h4_on_common("H4+", FULL_IMAGE, refined),
        _h5(asked),
    ]
    return correct_within_tiers(found, rules)


def _h1(asked: Asked) -> Decision:
    wanted, solvers = _references(asked.rows, asked.runs), solver_fronts(asked.methods)
    reference = next((name for name in wanted if name in asked.methods), None)

    def h1(paired: Sequence[ResultRow], own: list[str], others: list[str]) -> Decision:
        if reference not in others:
            return _undecided("H1", f"50-step inference ({' or '.join(wanted)}) was not run", _prompts(paired))
        return h1_efficiency(paired, own, reference, _known(solvers, others), asked.rules)

    return _on_common(h1, "H1", asked, [*([reference] if reference else ()), *members_of(solvers)])


def _h2(asked: Asked) -> Decision:
    solvers = solver_fronts(asked.methods)

    def h2(paired: Sequence[ResultRow], own: list[str], others: list[str]) -> Decision:
        if not others:
            return _undecided("H2", "no solver was run", _prompts(paired))
        return h2_quality(paired, own, _known(solvers, others), asked.rules, asked.spending)

    return _on_common(h2, "H2", asked, members_of(solvers))


def _h2_search(asked: Asked) -> Decision:
    solvers, searches = solver_fronts(asked.methods), search_families(asked.methods)

    def h2(paired: Sequence[ResultRow], own: list[str], others: list[str]) -> Decision:
        known = _known(searches, others)
        if not known:
            return _undecided("H2+", "neither best-of-N nor another search was run", _prompts(paired))
        return h2_search(paired, own, _known(solvers, others), known, asked.rules, asked.spending)

    return _on_common(h2, "H2+", asked, [*members_of(solvers), *members_of(searches)])


def _h5(asked: Asked) -> Decision:
    solvers, by_hand = solver_fronts(asked.methods), hand_made_rules(asked.methods)

    def h5(paired: Sequence[ResultRow], own: list[str], others: list[str]) -> Decision:
        known = [name for name in by_hand if name in others]
        if not known:
            return _undecided("H5", "no hand-made rule was run", _prompts(paired))
        return h5_learning(paired, own, known, _known(solvers, others), asked.rules, asked.spending)

    return _on_common(h5, "H5", asked, [*by_hand, *members_of(solvers)])


def _prompts(rows: Sequence[ResultRow]) -> int:
    return len({row.prompt for row in rows})


def _known(fronts: Groups, names: Sequence[str]) -> dict[str, list[str]]:
    """The fronts without the methods that ``names`` lack."""
    kept = {front: [name for name in members if name in names] for front, members in fronts.items()}
    return {front: members for front, members in kept.items() if members}


Decide = Callable[[Sequence[ResultRow], list[str], list[str]], Decision]  # rows, the agent's runs, other methods


def _on_common(decided: Decide, hypothesis: str, asked: Asked, others: Sequence[str]) -> Decision:
    """What ``decided`` makes of the pictures that the agent and ``others`` have in common, with the rules' metric."""
    rows, agent, metric, cost = asked.rows, asked.runs, asked.rules.metric, asked.spending.cost
    names = list(dict.fromkeys([*agent, *others]))
    scored = [row for row in rows if row.method not in names or score_value(row, metric) is not None]
    measured = {row.method for row in scored}
    known = [row for row in scored if row.method not in names or getattr(row, cost.name) is not None]
    having = {row.method for row in known}
    own = [name for name in agent if name in having]
    if not own:
        lacking = cost.words if set(agent) & measured else metric
        return _undecided(hypothesis, f"no picture of {' or '.join(agent)} has {lacking}", _prompts(rows))
    compared = [name for name in dict.fromkeys(others) if name in having]
    paired, notes = on_common_pictures(known, [*own, *compared])
    if not paired:
        return _undecided(hypothesis, f"its methods have no picture in common: {'; '.join(notes)}", 0)
    decision = decided(paired, own, compared)
    lacks = {name: cost.words if name in measured else metric for name in names if name not in having}
    mute = [Part(f"{name} has no {what}", UNDECIDED) for name, what in lacks.items()]
    return _noting(decision, mute, notes)


def _noting(decision: Decision, further: Sequence[Part], notes: Sequence[str]) -> Decision:
    """The decision with further parts, and with words on what was left out."""
    if further:
        known = decision.parts or (Part(decision.reason, decision.outcome),)
        decision = conclude(decision.hypothesis, decision.prompts, [*known, *further])
    return replace(decision, reason="; ".join([decision.reason, *notes]))


def _at_other_prices(asked: Asked, decisions: Sequence[Decision], spendings: Sequence[Spending]) -> list[Decision]:
    """H2 at every further price that the agents were run at, by names that say it; corrected in the place of H2."""
    found = []
    for price, runs in agent_runs_by_price(asked.methods).items():
        if not set(runs) & set(asked.runs):
            for spending in spendings:
                decision = _in_place(_h2(replace(asked, runs=runs, spending=spending)), decisions, asked.rules)
                suffix = "" if spending is NET_FLOPS else f" at equal {spending.cost.words}"
                found.append(replace(decision, hypothesis=f"H2 at price {price}{suffix}"))
    return found


def _in_place(decision: Decision, decisions: Sequence[Decision], rules: Rules) -> Decision:
    """The decision corrected within its tier, in the place of the one of its name."""
    others = [one for one in decisions if one.hypothesis != decision.hypothesis]
    return correct_within_tiers([decision, *others], rules)[0]


def _at_equal_seconds(asked: Asked, decisions: Sequence[Decision], timings: Timings | None) -> list[Decision]:
    """H2, H2+ and H5 once more, at equal seconds; not applicable where the agent was not timed.

    Each is corrected within its tier in the place of the one at equal net FLOPs, which stays as it is.
    """
    absent = _why_no_seconds(asked.rows, asked.runs, timings)
    found = []
    for name, decided in (("H2", _h2), ("H2+", _h2_search), ("H5", _h5)):
        if timings is None or absent:
            decision = Decision(name, NOT_APPLICABLE, absent, _prompts(asked.rows))
        else:
            decision = _in_place(decided(replace(asked, spending=at_seconds(timings))), decisions, asked.rules)
        found.append(replace(decision, hypothesis=f"{name} at equal seconds"))
    return found


def _why_no_seconds(rows: Sequence[ResultRow], runs: Sequence[str], timings: Timings | None) -> str:
    """Why nothing can be asked at equal seconds; empty where it can."""
    if timings is None:
        return f"no timings: `{COMMAND}` makes them"
    reasons = timings.why_untimed([row for row in rows if row.method in set(runs)])
    return "; ".join(f"{name} was not timed: {why}" for name, why in reasons.items())


def _h3_on_common(asked: Asked, complexity: Mapping[SampleKey, float]) -> Decision:
    """H3 on the pictures that all training runs have; it asks for no quality."""
    own = [name for name in asked.runs if name in asked.methods]
    paired, notes = on_common_pictures(asked.rows, own)
    if own and not paired:
        return _undecided("H3", f"the training runs have no picture in common: {'; '.join(notes)}", 0)
    lacking = [Part(f"{name} was not run", UNDECIDED) for name in asked.runs if name not in own]
    return _noting(h3_adaptivity(paired, own, complexity, asked.rules), lacking, notes)


def _h4_on_common(hypothesis: str, control: str, asked: Asked) -> Decision:
    """H4 or H4+ with the ``control`` of each of the agent's training runs."""
    agent = asked.runs
    names = [control.replace("agent", run, 1) for run in agent]
    label = control if len(agent) != 1 else names[0]

    def h4(paired: Sequence[ResultRow], own: list[str], others: list[str]) -> Decision:
        if not names or len(own) < len(agent) or set(others) != set(names):
            return _undecided(hypothesis, f"its control ({label}) was not run", _prompts(paired))
        return h4_refinement(paired, own, {label: names}, asked.rules, hypothesis)

    return _on_common(h4, hypothesis, asked, names if set(names) <= set(asked.methods) else ())


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
    if not set(by_method(rows)) & set(agents):
        return []
    refining = agents[:1] if set(control_names(agents[0])) & set(by_method(rows)) else agents
    timed = list(rows) if timings is None else timings.onto(rows)
    decisions = decide_all(timed, complexity, agents, rules, refining)
    asked, spendings = Asked(timed, agents, rules), [NET_FLOPS, *([] if timings is None else [at_seconds(timings)])]
    return [
        *decisions,
        *_at_other_prices(asked, decisions, spendings),
        *_at_equal_seconds(asked, decisions, timings),
    ]


def _references(rows: Sequence[ResultRow], agent: Sequence[str]) -> list[str]:
    """Names of 50-step inference: by the environment's own solver (a row's, such as ``euler-4``), and by DDIM."""
    own = [row.solver.rpartition("-")[0] for row in rows if row.method in set(agent)]
    return list(dict.fromkeys([f"{solver}-50" for solver in own if solver in FIXED_STEP_SOLVERS] + ["ddim-50"]))


def _undecided(hypothesis: str, reason: str, prompts: int) -> Decision:
    return Decision(hypothesis, UNDECIDED, reason, prompts)
