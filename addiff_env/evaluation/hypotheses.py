"""Verdicts on H1-H4 from per-image rows: supported, not supported, or undecided with the sample size that would decide.

Each hypothesis is a conjunction of parts, and each part is a one-sided test at level ``alpha``. A conjunction is
supported where every part is (an intersection-union test; Berger 1982), which needs no correction for their number.
One part that is not supported refutes it; otherwise the verdict is undecided, and the part that needs most prompts says
how many.

A part is *not supported* only where the data speak against it: where even the favourable end of its interval falls
short. An interval that is merely wide is undecided.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from addiff_env.evaluation.significance import (
    Interval,
    Measure,
    Resampled,
    costs_of,
    paired_values,
    partial_spearman,
    required_prompts,
    resample,
    score_of,
    spearman_test,
)
from addiff_env.types import Action, ResultRow

SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided"
Groups = Mapping[str, Sequence[str]]  # a name and the methods that are its training runs
Place = tuple[str, int]  # (prompt, seed)
AGENT = ""  # the agent's runs as one group; no method has this name


@dataclass(frozen=True)
class Rules:
    """What is fixed before anybody looks at the rows; margins in units of ``metric``."""

    metric: str = "success"
    margin: float = 0.02  # quality lost that still counts as equal (H1)
    worthwhile: float = 0.01  # smallest gain worth calling one (H2, H4): below it a gain is none
    max_nfe: float = 30.0  # mean NFE allowed (H1)
    correlation: float = 0.1  # smallest rank correlation worth calling one (H3)
    matched: float = 0.02  # relative difference of mean NFE up to which two methods spent the same (H4)
    alpha: float = 0.05  # level of every one-sided test; intervals are at 1 - 2 alpha
    power: float = 0.8  # of the sample size that would decide
    draws: int = 10_000  # bootstrap replicates
    seed: int = 0  # of the resampling

    def __post_init__(self) -> None:
        for name in ("margin", "worthwhile", "correlation"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"alpha must lie between 0 and 0.5, got {self.alpha}")

    @property
    def level(self) -> float:
        """Of the intervals: their ends are the one-sided bounds at ``alpha``."""
        return 1 - 2 * self.alpha


@dataclass(frozen=True)
class Part:
    """One condition of a hypothesis and what the rows say of it."""

    condition: str
    outcome: str
    estimate: float | None = None
    low: float | None = None  # ends of the interval at 1 - 2 alpha
    high: float | None = None
    p: float | None = None  # one-sided, of the condition's null hypothesis
    required: int | None = None  # prompts that would decide; None where decided, or where no number would


@dataclass(frozen=True)
class Verdict:
    """What the rows say of a hypothesis."""

    hypothesis: str
    outcome: str
    reason: str
    prompts: int
    parts: tuple[Part, ...] = field(default=())

    @property
    def required(self) -> int | None:
        """Prompts that would decide what is undecided, by its neediest part."""
        numbers = [part.required for part in self.parts if part.outcome == UNDECIDED and part.required]
        return max(numbers) if self.outcome == UNDECIDED and numbers else None


def conclude(hypothesis: str, prompts: int, parts: Sequence[Part]) -> Verdict:
    """Join the parts of a conjunction."""
    against = [part for part in parts if part.outcome == NOT_SUPPORTED]
    open_ = [part for part in parts if part.outcome == UNDECIDED]
    if against:
        return Verdict(
            hypothesis, NOT_SUPPORTED, "fails: " + "; ".join(p.condition for p in against), prompts, (*parts,)
        )
    if open_:
        return Verdict(hypothesis, UNDECIDED, "open: " + "; ".join(p.condition for p in open_), prompts, (*parts,))
    return Verdict(hypothesis, SUPPORTED, "every condition holds", prompts, (*parts,))


def above(condition: str, found: Interval, bound: float, worthwhile: float, prompts: int, rules: Rules) -> Part:
    """Is the true value above ``bound``? Not supported where it is surely less than ``worthwhile`` above it."""
    outcome = SUPPORTED if found.low > bound else NOT_SUPPORTED if found.high < bound + worthwhile else UNDECIDED
    gap = max(found.estimate - bound, bound + worthwhile - found.estimate)
    return _part(condition, outcome, found, found.p_below(bound), gap, prompts, rules)


def _part(
    condition: str, outcome: str, found: Interval, p: float | None, gap: float, prompts: int, rules: Rules
) -> Part:
    needed = required_prompts(gap, found.standard_error, prompts, rules.alpha, rules.power)
    return Part(condition, outcome, found.estimate, found.low, found.high, p, needed if outcome == UNDECIDED else None)


def _resample(
    rows: Sequence[ResultRow], groups: Mapping[str, Sequence[str]], measures: Sequence[Measure], rules: Rules
) -> tuple[Resampled, int]:
    """All groups and measures resampled together, and the number of prompts."""
    values = paired_values(rows, groups, measures)
    prompts = next(iter(values.values())).shape[-1]
    return resample(values, level=rules.level, draws=rules.draws, seed=rules.seed), prompts


def _flatten(agent: Sequence[str], fronts: Groups, *others: str) -> dict[str, list[str]]:
    """Groups to read: the agent's training runs, and every other method by itself."""
    names = dict.fromkeys([*(name for members in fronts.values() for name in members), *others])
    if not agent or not all(fronts.values()):
        raise ValueError(f"the agent and every front need a method, got {list(agent)} and {dict(fronts)}")
    overlap = sorted(set(agent) & set(names))
    if overlap:
        raise ValueError(f"{overlap} cannot be the agent and its baseline")
    return {AGENT: list(agent), **{name: [name] for name in names}}


def solver_fronts(methods: Iterable[str]) -> dict[str, list[str]]:
    """Fixed-step methods by solver, from names such as ``ddim-50``; other names are left out."""
    fronts: dict[str, list[str]] = {}
    for name in methods:
        solver, _, steps = name.rpartition("-")
        if solver and steps.isdigit():
            fronts.setdefault(solver, []).append(name)
    return fronts


# --------------------------------------------------------------------------- H1


def h1_efficiency(
    rows: Sequence[ResultRow],
    agent: Sequence[str],
    reference: str,
    fronts: Groups,
    rules: Rules = Rules(),  # noqa: B008 (frozen)
) -> Verdict:
    """H1: the quality of 50-step inference at <= 30 mean NFE, which fixed inference does not have at that compute.

    Parts: mean NFE within ``max_nfe``; quality not inferior to the reference; at the agent's net FLOPs quality not
    inferior to any solver's interpolated front; and no fixed-step method that costs no more net FLOPs is itself as
    good as the agent. Without the last part a plain 25-step solver "supports" H1, as in the published prototype.

    Args:
        rows: per-image rows.
        agent: the agent's training runs, as method names.
        reference: 50-step inference, e.g. ``ddim-50``.
        fronts: fixed-step methods of each solver.
        rules: margins and levels.
    """
    measures = [score_of(rules.metric), costs_of("net_flops"), costs_of("nfe")]
    found, prompts = _resample(rows, _flatten(agent, fronts, reference), measures, rules)
    against = _not_inferior(f"quality not inferior to {reference}", found.difference(AGENT, reference), prompts, rules)
    parts = [_within_nfe(found.mean(AGENT, 2), prompts, rules), against]
    for solver, members in fronts.items():
        condition = f"not inferior to the front of {solver} at equal net FLOPs"
        parts.append(_not_inferior(condition, found.distance(AGENT, members), prompts, rules))
    for name in dict.fromkeys(name for members in fronts.values() for name in members):
        if found.means[name][1] <= found.means[AGENT][1]:
            parts.append(_no_match(name, found.difference(AGENT, name), prompts, rules))
    return conclude("H1", prompts, parts)


def _within_nfe(spent: Interval, prompts: int, rules: Rules) -> Part:
    bound = rules.max_nfe
    outcome = SUPPORTED if spent.high <= bound else NOT_SUPPORTED if spent.low > bound else UNDECIDED
    return _part(f"mean NFE at most {bound:g}", outcome, spent, None, abs(spent.estimate - bound), prompts, rules)


def _not_inferior(condition: str, found: Interval, prompts: int, rules: Rules) -> Part:
    bound = -rules.margin
    outcome = SUPPORTED if found.low > bound else NOT_SUPPORTED if found.high < bound else UNDECIDED
    return _part(condition, outcome, found, found.p_below(bound), abs(found.estimate - bound), prompts, rules)


def _no_match(name: str, found: Interval, prompts: int, rules: Rules) -> Part:
    """Is ``name``, which costs no more than the agent, worse than it? ``found``: agent minus ``name``."""
    condition = f"better than {name}, which costs no more"
    outcome = NOT_SUPPORTED if found.high < rules.margin else SUPPORTED if found.low > 0 else UNDECIDED
    gap = max(found.estimate, rules.margin - found.estimate)
    return _part(condition, outcome, found, found.p_below(0.0), gap, prompts, rules)


# --------------------------------------------------------------------------- H2


def h2_quality(
    rows: Sequence[ResultRow],
    agent: Sequence[str],
    fronts: Groups,
    rules: Rules = Rules(),  # noqa: B008 (frozen)
) -> Verdict:
    """H2: at the agent's mean net FLOPs its quality lies above every interpolated front.

    Args:
        rows: per-image rows.
        agent: the agent's training runs, as method names.
        fronts: methods of each solver, and of best-of-N; the front over all of them together is tested as well, since
            a mixture of two solvers is fixed inference too.
        rules: margins and levels.
    """
    measures = [score_of(rules.metric), costs_of("net_flops")]
    found, prompts = _resample(rows, _flatten(agent, fronts), measures, rules)
    together = list(dict.fromkeys(name for members in fronts.values() for name in members))
    families = {**fronts, "all fixed methods": together} if len(fronts) > 1 else dict(fronts)
    parts = []
    for family, members in families.items():
        condition = f"above the front of {family} at equal net FLOPs"
        parts.append(above(condition, found.distance(AGENT, members), 0.0, rules.worthwhile, prompts, rules))
    return conclude("H2", prompts, parts)


# --------------------------------------------------------------------------- H3


def h3_adaptivity(
    rows: Sequence[ResultRow],
    agent: Sequence[str],
    complexity: Mapping[Place, float],
    rules: Rules = Rules(),  # noqa: B008 (frozen)
) -> Verdict:
    """H3: complex prompts get more denoiser evaluations than simple ones.

    Parts: Spearman's correlation of a prompt's mean NFE with its complexity is positive by the bootstrap and against a
    permutation null; and it stays so among pictures that share a seed (where the benchmark's seeds repeat: where each
    picture has its own, nothing can be held constant and the part is left out).

    Args:
        rows: per-image rows.
        agent: the agent's training runs, as method names; they are averaged.
        complexity: of every (prompt, seed), e.g. `Item.facts`.
        rules: margins and levels.

    Raises:
        ValueError: a picture without a complexity, or all prompts equally complex.
    """
    taken = [row for row in rows if row.method in set(agent)]
    unknown = [(row.prompt, row.seed) for row in taken if (row.prompt, row.seed) not in complexity]
    if unknown:
        raise ValueError(f"no complexity of {len(unknown)} pictures, e.g. {unknown[0]}")
    by_prompt = paired_values(rows, {AGENT: agent}, [costs_of("nfe"), lambda row: complexity[row.prompt, row.seed]])[
        AGENT
    ]
    nfe, level = by_prompt.mean(1)
    if np.ptp(level) == 0:
        raise ValueError(f"every prompt has complexity {level[0]:g}: nothing to adapt to")
    if np.ptp(nfe) == 0:
        return conclude("H3", nfe.size, [Part(f"NFE varies (it is {nfe[0]:g} for every prompt)", NOT_SUPPORTED)])
    return conclude("H3", nfe.size, _correlation_parts(level, nfe, rules) + _partial_parts(taken, complexity, rules))


def _correlation_parts(level: np.ndarray, nfe: np.ndarray, rules: Rules) -> list[Part]:
    found = spearman_test(level, nfe, level=rules.level, draws=min(rules.draws, 2000), seed=rules.seed)
    bootstrap = above("NFE grows with complexity", found.rho, 0.0, rules.correlation, nfe.size, rules)
    p = found.p_permutation
    outcome = SUPPORTED if p <= rules.alpha else NOT_SUPPORTED if bootstrap.outcome == NOT_SUPPORTED else UNDECIDED
    condition = "more than when complexities are dealt out at random"
    rho = found.rho
    gap = max(rho.estimate, rules.correlation - rho.estimate)
    return [bootstrap, _part(condition, outcome, rho, p, gap, nfe.size, rules)]


def _partial_parts(rows: Sequence[ResultRow], complexity: Mapping[Place, float], rules: Rules) -> list[Part]:
    level, nfe, seeds = (
        np.array([value(row) for row in rows], float)
        for value in (lambda r: complexity[r.prompt, r.seed], lambda r: r.nfe, lambda r: r.seed)
    )
    rho = partial_spearman(level, nfe, seeds)
    if rho is None or len(np.unique(seeds)) > len({row.prompt for row in rows}) / 2:
        return []
    prompts = {prompt: k for k, prompt in enumerate(dict.fromkeys(row.prompt for row in rows))}
    owner = np.array([prompts[row.prompt] for row in rows])
    found = _resampled_partial(rho, (level, nfe, seeds), owner, rules)
    return [above("also among pictures of one seed", found, 0.0, rules.correlation, len(prompts), rules)]


def _resampled_partial(
    rho: float, variables: tuple[np.ndarray, np.ndarray, np.ndarray], owner: np.ndarray, rules: Rules
) -> Interval:
    """Bootstrap over prompts, each with all its pictures."""
    rng = np.random.default_rng([rules.seed, 3])
    pictures = [np.flatnonzero(owner == k) for k in range(owner.max() + 1)]
    draws = []
    for _ in range(min(rules.draws, 500)):
        index = np.concatenate([pictures[k] for k in rng.integers(len(pictures), size=len(pictures))])
        value = partial_spearman(*(variable[index] for variable in variables))
        if value is not None and np.isfinite(value):
            draws.append(value)
    replicates = np.array(draws)
    low, high = np.quantile(replicates, [rules.alpha, 1 - rules.alpha])
    return Interval(rho, float(low), float(high), replicates)


# --------------------------------------------------------------------------- H4


def h4_refinement(
    rows: Sequence[ResultRow],
    refining: Sequence[str],
    controls: Sequence[str],
    rules: Rules = Rules(),  # noqa: B008 (frozen)
) -> Verdict:
    """H4: refining regions beats the same NFE spent on full-image steps.

    Args:
        rows: per-image rows.
        refining: the agent's training runs, as method names.
        controls: the same decisions with ``mask=full``, and with further continues instead of refinements.
        rules: margins and levels.

    Raises:
        ValueError: a control that spent less NFE than the agent, so that it is none; with both numbers.
    """
    groups = _flatten(refining, {"controls": list(controls)})
    found, prompts = _resample(rows, groups, [score_of(rules.metric), costs_of("nfe")], rules)
    if not any(row.method in set(refining) and Action.REFINE in row.actions for row in rows):
        return conclude("H4", prompts, [Part("the agent refines (it never does)", NOT_SUPPORTED)])
    parts = []
    for name in controls:
        _refuse_unmatched(name, float(found.means[name][1]), float(found.means[AGENT][1]), rules)
        condition = f"better than {name} at equal NFE"
        parts.append(above(condition, found.difference(AGENT, name), 0.0, rules.worthwhile, prompts, rules))
    return conclude("H4", prompts, parts)


def _refuse_unmatched(name: str, spent: float, wanted: float, rules: Rules) -> None:
    if spent < wanted * (1 - rules.matched):
        raise ValueError(
            f"control {name!r} spent {spent:.2f} NFE where refining spent {wanted:.2f}: not the same compute "
            f"(allowed: {100 * rules.matched:g}% less)"
        )


# --------------------------------------------------------------------------- all of them

FULL_IMAGE, CONTINUED = "agent, mask=full", "agent, continued"  # H4's controls, by method name


def solver_families(methods: Sequence[str]) -> dict[str, list[str]]:
    """`solver_fronts` without blind and stopping rules and other models, and with best-of-N as a family of its own."""
    best = [name for name in methods if name.startswith("best-of-")]
    families = solver_fronts(name for name in methods if ":" not in name)
    others = ("words", "stop", "sdxl-turbo")  # SDXL-Turbo is another model: no fixed-step inference of this one
    plain = {name: members for name, members in families.items() if name not in others}
    return plain | ({"best-of-N": best} if best else {})


def all_verdicts(
    rows: Sequence[ResultRow],
    complexity: Mapping[Place, float],
    agent: Sequence[str] = ("agent",),
    rules: Rules = Rules(),  # noqa: B008 (frozen)
) -> list[Verdict]:
    """H1-H4, as far as the methods that were run allow; a hypothesis whose methods are missing is undecided."""
    methods = list(dict.fromkeys(row.method for row in rows))
    prompts = len({row.prompt for row in rows})
    families = solver_families(methods)
    solvers = {name: members for name, members in families.items() if name != "best-of-N"}
    reference = next((name for name in methods if name.endswith("-50") and name in sum(solvers.values(), [])), None)
    controls = [name for name in (FULL_IMAGE, CONTINUED) if name in methods]
    found = [
        _undecided("H1", "50-step inference was not run", prompts),
        _undecided("H2", "no solver was run", prompts),
        _undecided("H3", "every prompt is equally complex", prompts),
        _undecided("H4", "its controls were not run", prompts),
    ]
    if reference:
        found[0] = h1_efficiency(rows, agent, reference, solvers, rules)
    if families:
        found[1] = h2_quality(rows, agent, families, rules)
    if len(set(complexity.values())) > 1:
        found[2] = h3_adaptivity(rows, agent, complexity, rules)
    if len(controls) == 2:
        found[3] = h4_refinement(rows, agent, controls, rules)
    return found


def _undecided(hypothesis: str, reason: str, prompts: int) -> Verdict:
    return Verdict(hypothesis, UNDECIDED, reason, prompts)


# --------------------------------------------------------------------------- words


def describe(verdict: Verdict) -> str:
    """A verdict as text: one line, and one for each condition with its numbers."""
    needed = f"; about {verdict.required:,} prompts would decide" if verdict.required else ""
    lines = [f"{verdict.hypothesis}: {verdict.outcome} ({verdict.prompts:,} prompts; {verdict.reason}{needed})"]
    for part in verdict.parts:
        numbers = "" if part.estimate is None else f": {part.estimate:.4g} [{part.low:.4g}, {part.high:.4g}]"
        p = "" if part.p is None else f", p = {part.p:.2g}"
        lines.append(f"  {part.outcome}: {part.condition}{numbers}{p}")
    return "\n".join(lines)
