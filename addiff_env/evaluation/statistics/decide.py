"""H1-H4 from any rows: each decided on the pictures that all of its methods have with the metric.

What was left out is said; a method that never has the metric leaves its part undecided, and so do fewer than ten
prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from addiff_env.evaluation.statistics.decision import UNDECIDED, Decision, Part, Rules, conclude
from addiff_env.evaluation.statistics.families import (
    BEST_OF,
    CONTINUED,
    FIXED_STEP_SOLVERS,
    FULL_IMAGE,
    Groups,
    agent_runs,
    agent_runs_by_price,
    control_names,
    members_of,
    solver_families,
)
from addiff_env.evaluation.statistics.hypotheses import h1_efficiency, h2_quality, h3_adaptivity, h4_refinement
from addiff_env.evaluation.statistics.pairing import on_common_pictures
from addiff_env.evaluation.statistics.summary import score_value
from addiff_env.types import ResultRow, SampleKey


def decide_all(
    rows: Sequence[ResultRow],
    complexity: Mapping[SampleKey, float],
    agent: Sequence[str] | None = None,
    rules: Rules = Rules(),  # noqa: B008 (frozen)
) -> list[Decision]:
    """H1-H4, as far as the rows allow; a hypothesis whose methods are missing is undecided.

    Args:
        rows: per-image rows.
        complexity: of every (prompt, seed), e.g. `Item.num_requirements`.
        agent: the agent's training runs, as method names; by default `agent_runs` of the rows.
        rules: margins and levels.

    Raises:
        ValueError: no rows of the agent.
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    runs = agent_runs(methods) if agent is None else list(agent)
    if not set(runs) & set(methods):
        raise ValueError(f"no rows of the agent ({', '.join(runs) or 'none was named'}); rows are of {methods}")
    wanted = _references(rows, runs)
    reference = next((name for name in wanted if name in methods), None)
    families = solver_families(methods)
    solvers = {name: members for name, members in families.items() if name != BEST_OF}

    def h1(paired: Sequence[ResultRow], own: list[str], others: list[str]) -> Decision:
        if reference not in others:
            return _undecided("H1", f"50-step inference ({' or '.join(wanted)}) was not run", _prompts(paired))
        return h1_efficiency(paired, own, reference, _known(solvers, others), rules)

    compared = [*([reference] if reference else ()), *members_of(solvers)]
    return [
        _on_common(h1, "H1", rows, runs, compared, rules),
        _h2_on_common(rows, runs, families, rules),
        _h3_on_common(rows, runs, complexity, rules),
        _h4_on_common(rows, runs, _controls(methods, runs), rules),
    ]


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
) -> Decision:
    """What ``decided`` makes of the pictures that the agent and ``others`` have in common, with the rules' metric."""
    names = list(dict.fromkeys([*agent, *others]))
    known = [row for row in rows if row.method not in names or score_value(row, rules.metric) is not None]
    having = {row.method for row in known}
    own = [name for name in agent if name in having]
    if not own:
        return _undecided(hypothesis, f"no picture of {' or '.join(agent)} has {rules.metric}", _prompts(rows))
    compared = [name for name in dict.fromkeys(others) if name in having]
    paired, notes = on_common_pictures(known, [*own, *compared])
    if not paired:
        return _undecided(hypothesis, f"its methods have no picture in common: {'; '.join(notes)}", 0)
    decision = decided(paired, own, compared)
    mute = [Part(f"{name} has no {rules.metric}", UNDECIDED) for name in names if name not in having]
    return _noting(decision, mute, notes)


def _noting(decision: Decision, further: Sequence[Part], notes: Sequence[str]) -> Decision:
    """The decision with further parts, and with words on what was left out."""
    if further:
        known = decision.parts or (Part(decision.reason, decision.outcome),)
        decision = conclude(decision.hypothesis, decision.prompts, [*known, *further])
    return replace(decision, reason="; ".join([decision.reason, *notes]))


def _h2_on_common(rows: Sequence[ResultRow], agent: Sequence[str], families: Groups, rules: Rules) -> Decision:
    """H2 with every solver and best-of-N."""

    def h2(paired: Sequence[ResultRow], own: list[str], others: list[str]) -> Decision:
        if not others:
            return _undecided("H2", "no solver was run", _prompts(paired))
        return h2_quality(paired, own, _known(families, others), rules)

    return _on_common(h2, "H2", rows, agent, members_of(families), rules)


def _at_other_prices(rows: Sequence[ResultRow], agents: Sequence[str], rules: Rules) -> list[Decision]:
    """H2 at every further price that the agents were run at, by names that say it."""
    methods = list(dict.fromkeys(row.method for row in rows))
    found = []
    for price, runs in agent_runs_by_price(methods).items():
        if not set(runs) & set(agents):
            decision = _h2_on_common(rows, runs, solver_families(methods), rules)
            found.append(replace(decision, hypothesis=f"H2 at price {price}"))
    return found


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


def _h4_on_common(rows: Sequence[ResultRow], agent: Sequence[str], controls: Groups, rules: Rules) -> Decision:
    """H4 with the controls of the agent's training runs, by the control's name."""
    names = members_of(controls)

    def h4(paired: Sequence[ResultRow], own: list[str], others: list[str]) -> Decision:
        if len(controls) < 2 or len(own) < len(agent) or set(others) != set(names):
            return _undecided("H4", "its controls were not run", _prompts(paired))
        return h4_refinement(paired, own, controls, rules)

    return _on_common(h4, "H4", rows, agent, names, rules)


def decide(
    rows: Sequence[ResultRow],
    complexity: Mapping[SampleKey, float],
    rules: Rules = Rules(),  # noqa: B008 (frozen)
    agents: Sequence[str] = ("agent",),
) -> list[Decision]:
    """Verdicts on H1-H4 from any rows; none without rows of ``agents``, which are training runs of one group.

    Of several the first alone has H4's controls, so that H4 is about that one. H2 is decided at every further price
    that they were run at, too.
    """
    if not {row.method for row in rows} & set(agents):
        return []
    return [*_decide_group(rows, complexity, rules, agents), *_at_other_prices(rows, agents, rules)]


def _decide_group(
    rows: Sequence[ResultRow], complexity: Mapping[SampleKey, float], rules: Rules, agents: Sequence[str]
) -> list[Decision]:
    """H1-H4 of one group."""
    if len(agents) == 1:
        return decide_all(rows, complexity, agent=agents, rules=rules)
    controls = control_names(agents[0])
    others = [row for row in rows if row.method not in controls]
    *verdicts, last = decide_all(others, complexity, agent=agents, rules=rules)
    if set(controls) <= {row.method for row in rows}:
        last = _h4_on_common(rows, agents[:1], {name: [name] for name in controls}, rules)
    return [*verdicts, last]


def _references(rows: Sequence[ResultRow], agent: Sequence[str]) -> list[str]:
    """Names of 50-step inference: by the environment's own solver (a row's, such as ``euler-4``), and by DDIM."""
    own = [row.solver.rpartition("-")[0] for row in rows if row.method in set(agent)]
    return list(dict.fromkeys([f"{solver}-50" for solver in own if solver in FIXED_STEP_SOLVERS] + ["ddim-50"]))


def _controls(methods: Sequence[str], agent: Sequence[str]) -> dict[str, list[str]]:
    """H4's controls of every training run, those that all runs have."""
    named = {name: [name.replace("agent", run, 1) for run in agent] for name in (FULL_IMAGE, CONTINUED)}
    return {name: own for name, own in named.items() if own and set(own) <= set(methods)}


def _undecided(hypothesis: str, reason: str, prompts: int) -> Decision:
    return Decision(hypothesis, UNDECIDED, reason, prompts)
