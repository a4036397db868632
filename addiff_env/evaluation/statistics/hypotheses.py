"""Verdicts on H1-H4 from per-image rows: supported, not supported, or undecided with the sample size that would decide.

Each hypothesis is a conjunction of parts, and each part is a one-sided test at level ``alpha``. A conjunction is
supported where every part is (an intersection-union test; Berger 1982), which needs no correction for their number.
One part that is not supported refutes it; otherwise the verdict is undecided, and the part that needs most prompts says
how many. What was not run leaves its part undecided: no number of prompts decides that.

A part is *not supported* only where the data speak against it: where even the favourable end of its interval falls
short. An interval that is merely wide is undecided. As one part is enough, these ends hold for all comparisons of a
hypothesis at once (`critical_value`), so that a true one is refuted with probability ``alpha`` at most, however many
methods it was compared with. (H3 is refuted by either of two correlations, each at ``alpha``.)

Means are those of pictures, as in the tables; prompts are what is resampled. H3's correlations take one value per
prompt.

Any rows get verdicts (`decide`). A hypothesis is decided on those pictures that all of its methods have with the
metric; what was left out is said, a method that never has it leaves its part undecided, and so do fewer than ten
prompts.

Where the metric is 0 or 1, replicates are drawn from the prompts and two more, on one of which only the agent passes,
and on the other everything but the agent (after Bonett & Price 2012). Methods that disagree on no prompt, or hardly
any, would otherwise have an interval of no width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats

from addiff_env.evaluation.statistics.significance import (
    Interval,
    Least,
    Measure,
    Resampled,
    TooFewReplicates,
    costs_of,
    critical_value,
    interval,
    mean_over_pictures,
    on_common_pictures,
    paired_values,
    partial_spearman,
    picture_counts,
    required_prompts,
    required_runs,
    resampled_means,
    score_of,
    spearman_test,
)
from addiff_env.evaluation.statistics.summary import counted, score_value, share_metrics
from addiff_env.types import Action, ResultRow

SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided"
NOT_APPLICABLE = "not applicable"  # a part about which nothing can be asked: it neither supports nor blocks
SOLVERS = ("ddim", "dpmpp_2m", "euler", "unipc", "pndm")  # the model's own fixed-step inference; others change it
BEST_OF = "best-of-N"  # the family of best-of-N at every N
LEAST_PROMPTS = 10  # with fewer the percentile bootstrap is far from its level
Values = Mapping[str, np.ndarray]  # per group (measures, runs, prompts)
Groups = Mapping[str, Sequence[str]]  # a name and the methods that are its training runs
Place = tuple[str, int]  # (prompt, seed)
AGENT = ""  # the agent's runs as one group; no method has this name


@dataclass(frozen=True)
class Rules:
    """What is fixed before anybody looks at the rows; margins in units of ``metric``."""

    metric: str = "success"
    margin: float = 0.02  # quality lost that still counts as equal (H1)
    worthwhile: float = 0.01  # smallest gain worth calling one (H2, H4): what is surely less refutes
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
        if not 0 < self.power < 1:
            raise ValueError(f"power must lie between 0 and 1, got {self.power}")
        if self.draws + 1 < 1 / self.alpha:
            raise ValueError(f"bounds at {self.alpha:g} need {math.ceil(1 / self.alpha - 1)} draws, got {self.draws}")

    @property
    def level(self) -> float:
        """Of the intervals: their ends are the one-sided bounds at ``alpha``."""
        return 1 - 2 * self.alpha

    def fewer(self, draws: int) -> int:
        """Replicates of a costly statistic: as few as that, but enough for bounds at ``alpha``."""
        return min(self.draws, max(draws, math.ceil(10 / self.alpha)))


@dataclass(frozen=True)
class Part:
    """One condition of a hypothesis and what the rows say of it."""

    condition: str
    outcome: str
    estimate: float | None = None
    low: float | None = None  # one-sided bounds: at alpha the one that would support, and at alpha over all
    high: float | None = None  # comparisons of the hypothesis the one that would refute
    p: float | None = None  # one-sided, of the condition's null hypothesis
    required: int | None = None  # prompts that would decide; None where decided, or where no number would
    runs: int | None = None  # training runs needed at the least, where no number of prompts would decide
    note: str = ""  # e.g. which of several comparisons decides


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
        """Prompts that would decide what is undecided, by its neediest part; None where no number would."""
        numbers = [part.required for part in self.parts if part.outcome == UNDECIDED]
        return max(filter(None, numbers)) if self.outcome == UNDECIDED and numbers and all(numbers) else None

    @property
    def runs(self) -> int | None:
        """Training runs that are needed at the least; None where runs are not what is lacking."""
        numbers = [part.runs for part in self.parts if part.outcome == UNDECIDED and part.runs]
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


@dataclass(frozen=True)
class Judge:
    """Makes parts of differences."""

    prompts: int
    rules: Rules
    runs: int = 1  # training runs of the agent
    critical: float | None = None  # of bounds that refute, see `critical_value`; None: the intervals' own ends

    def above(self, condition: str, found: Interval | Least, bound: float, worthwhile: float = 0.0) -> Part:
        """Is the true value above ``bound``? Not supported where it is surely less than ``worthwhile`` above it."""
        high = found.high if self.critical is None else found.ceiling(self.critical)
        p = found.p_below(bound)  # at most alpha just where the lower bound lies above
        outcome = SUPPORTED if p <= self.rules.alpha else NOT_SUPPORTED if high < bound + worthwhile else UNDECIDED
        part = Part(condition, outcome, found.estimate, found.low, high, p)
        note = f"nearest: {found.nearest}" if isinstance(found, Least) else ""
        return self.needing(replace(part, note=note), found, bound, worthwhile)

    def at_most(self, condition: str, found: Interval, bound: float) -> Part:
        """Is the true value at most ``bound``?"""
        low = found.low if self.critical is None else -found.negated().ceiling(self.critical)
        enough = found.high <= bound + found.rounding  # who spends just what is allowed keeps within it
        outcome = SUPPORTED if enough else NOT_SUPPORTED if low > bound + found.rounding else UNDECIDED
        return self.needing(Part(condition, outcome, found.estimate, low, found.high), found.negated(), -bound)

    def needing(self, part: Part, found: Interval | Least, bound: float, worthwhile: float = 0.0) -> Part:
        """The part with the prompts, or else the training runs, that would decide it, whichever way takes fewer.

        It is supported once every comparison lies above ``bound`` that does not yet, and refuted once a single one
        surely lies below ``bound + worthwhile``, by the bounds that hold for all comparisons at once.
        """
        if part.outcome != UNDECIDED:
            return part
        everything = list(found.differences.values()) if isinstance(found, Least) else [found]
        open_ = [one for one in everything if one.p_below(bound) > self.rules.alpha] or everything
        joint = self.rules.alpha if self.critical is None else float(stats.norm.sf(self.critical))
        above = [self._needed(one.estimate - bound, one, self.rules.alpha) for one in open_]
        below = [self._needed(bound + worthwhile - one.estimate, one, joint) for one in everything]
        prompts, runs = (_fewest([_all_of([n[k] for n in above]), *(n[k] for n in below)]) for k in (0, 1))
        return replace(part, required=prompts, runs=None if prompts else runs)

    def _needed(self, gap: float, one: Interval, alpha: float) -> tuple[int | None, int | None]:
        """Prompts, and where no number of these would do training runs, that tell a value from one ``gap`` away."""
        error, power = one.run_error, self.rules.power
        if prompts := required_prompts(gap, one.standard_error, self.prompts, alpha, power, error):
            return prompts, self.runs
        return None, required_runs(gap, error, self.runs, alpha, power)


def _all_of(numbers: Sequence[int | None]) -> int | None:
    """The largest number; None where one is not known."""
    known = [number for number in numbers if number is not None]
    return max(known) if len(known) == len(numbers) else None


def _fewest(numbers: Sequence[int | None]) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


def _too_few(hypothesis: str, rows: Sequence[ResultRow], agent: Sequence[str]) -> Verdict | None:
    """The verdict where there are not enough prompts to resample."""
    prompts = len({row.prompt for row in rows if row.method in set(agent)})
    if prompts >= LEAST_PROMPTS or not prompts:  # rows of nobody are refused where they are read
        return None
    return conclude(hypothesis, prompts, [Part(f"a bootstrap needs {LEAST_PROMPTS} prompts, got {prompts}", UNDECIDED)])


@dataclass(frozen=True)
class _Read:
    """Values of every group, the metric first, and the same with two prompts more where the metric is 0 or 1."""

    values: Values
    padded: Values
    pictures: np.ndarray  # of each prompt (prompts,): what it weighs

    @property
    def prompts(self) -> int:
        """How many there are."""
        return len(self.pictures)

    def against(self) -> _Read:
        """The agent minus each control, run by run: a control repeats the decisions of one run."""
        return replace(self, values=_against(self.values), padded=_against(self.padded))


def _read(rows: Sequence[ResultRow], groups: Groups, measures: Sequence[Measure], rules: Rules) -> _Read:
    values, pictures = paired_values(rows, groups, measures), picture_counts(rows, next(iter(groups.values()))[0])
    if rules.metric not in share_metrics(rows):
        return _Read(values, values, pictures)
    padded = {name: _with_disagreement(array, pictures, name == AGENT) for name, array in values.items()}
    return _Read(values, padded, pictures)


def _with_disagreement(array: np.ndarray, pictures: np.ndarray, is_agent: bool) -> np.ndarray:
    """(measures, runs, prompts + 2): a prompt that only the agent passes, one that only it fails, at mean cost."""
    further = np.repeat(mean_over_pictures(array, pictures)[..., None], 2, axis=2)  # (measures, runs, 2)
    further[0] = (1.0, 0.0) if is_agent else (0.0, 1.0)
    return np.concatenate([array, further], axis=2)


def _resample(read: _Read, rules: Rules) -> Resampled:
    """The means of the values with replicates of the padded ones, moved to have the same centre."""
    runs = {name: mean_over_pictures(array, read.pictures) for name, array in read.values.items()}
    means = {name: array.mean(1) for name, array in runs.items()}
    number = next(iter(read.padded.values())).shape[-1] - read.prompts
    pictures = np.append(read.pictures, np.full(number, read.pictures.mean()))  # a prompt more is one of the usual size
    drawn = resampled_means(read.padded, rules.draws, rules.seed, pictures)
    centres = {name: mean_over_pictures(array, pictures).mean(1) for name, array in read.padded.items()}
    centred = {name: draws + means[name] - centres[name] for name, draws in drawn.items()}
    return Resampled(means, centred, rules.level, runs)


def _flatten(agent: Sequence[str], fronts: Groups, *others: str) -> dict[str, list[str]]:
    """Groups to read: the agent's training runs, and every other method by itself."""
    names = dict.fromkeys([*(name for members in fronts.values() for name in members), *others])
    if not agent or not all(fronts.values()):
        raise ValueError(f"the agent and every front need a method, got {list(agent)} and {dict(fronts)}")
    overlap = sorted(set(agent) & set(names))
    if overlap:
        raise ValueError(f"{overlap} cannot be the agent and its baseline")
    return {AGENT: list(agent), **{name: [name] for name in names}}


def _members(fronts: Groups) -> list[str]:
    return list(dict.fromkeys(name for members in fronts.values() for name in members))


def _comparisons(found: Iterable[Interval | Least]) -> list[Interval]:
    """Every single comparison, for `critical_value`."""
    parts = [list(one.differences.values()) if isinstance(one, Least) else [one] for one in found]
    return [one for part in parts for one in part]


def _not_run(fronts: Groups, best_of: bool) -> list[Part]:
    """What the null hypothesis holds and nobody ran: every solver's front, and best-of-N where it belongs to it."""
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


def solver_fronts(methods: Iterable[str]) -> dict[str, list[str]]:
    """Fixed-step methods by solver (`SOLVERS`), from names such as ``ddim-50``; other names are left out."""
    fronts: dict[str, list[str]] = {}
    for name in methods:
        solver, _, steps = name.rpartition("-")
        if solver in SOLVERS and steps.isdigit():
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
    read = _read(rows, groups, [score_of(rules.metric), costs_of("net_flops"), costs_of("nfe")], rules)
    found = _resample(read, rules)
    spent, behind = found.mean(AGENT, 2), found.difference(AGENT, reference)
    distances = {solver: found.above_front(AGENT, members) for solver, members in fronts.items()}
    cheaper = [name for name in _members(fronts) if found.means[name][1] <= found.means[AGENT][1]]
    rivals = {name: found.difference(AGENT, name) for name in cheaper}
    everything = _comparisons([spent.negated(), behind, *distances.values(), *rivals.values()])
    judge = Judge(read.prompts, rules, len(agent), critical_value(everything, rules.alpha))
    parts = [
        judge.at_most(f"mean NFE at most {rules.max_nfe:g}", spent, rules.max_nfe),
        judge.above(f"quality not inferior to {reference}", behind, -rules.margin),
    ]
    for solver, distance in distances.items():
        condition = f"not inferior to the front of {solver} at equal net FLOPs"
        parts.append(_reaching(judge.above(condition, distance, -rules.margin), solver, fronts[solver], found))
    for name, rival in rivals.items():
        parts.append(judge.above(f"better than {name}, which costs no more", rival, 0.0, rules.margin))
    return conclude("H1", judge.prompts, [*parts, *_not_run(fronts, best_of=False)])


# --------------------------------------------------------------------------- H2


def h2_quality(
    rows: Sequence[ResultRow],
    agent: Sequence[str],
    fronts: Groups,
    rules: Rules = Rules(),  # noqa: B008 (frozen)
) -> Verdict:
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
    read = _read(rows, groups, [score_of(rules.metric), costs_of("net_flops")], rules)
    found = _resample(read, rules)
    families = {**fronts, "all fixed methods": _members(fronts)} if len(fronts) > 1 else dict(fronts)
    distances = {family: found.above_front(AGENT, members) for family, members in families.items()}
    critical = critical_value(_comparisons(distances.values()), rules.alpha)
    judge = Judge(read.prompts, rules, len(agent), critical)
    parts = []
    for family, distance in distances.items():
        condition = f"above the front of {family} at equal net FLOPs"
        part = judge.above(condition, distance, 0.0, rules.worthwhile)
        parts.append(_reaching(part, family, families[family], found))
    return conclude("H2", judge.prompts, [*parts, *_not_run(fronts, best_of=True)])


# --------------------------------------------------------------------------- H3


NO_PARTIAL = "too few prompts share a seed to partial it out (it is independent of the prompt by design)"


def h3_adaptivity(
    rows: Sequence[ResultRow],
    agent: Sequence[str],
    complexity: Mapping[Place, float],
    rules: Rules = Rules(),  # noqa: B008 (frozen)
) -> Verdict:
    """H3: complex prompts get more denoiser evaluations than simple ones.

    Parts: Spearman's correlation of a prompt's mean NFE with its complexity is positive by the bootstrap and against a
    permutation null; and it stays so among pictures that share a seed. Where every prompt has seeds of its own nothing
    can be held constant, and nothing need be: seeds are dealt out without a look at the prompt, so that no seed can
    make complex prompts take longer. That part is not applicable then, and the others decide.

    Args:
        rows: per-image rows.
        agent: the agent's training runs, as method names; the mean of their own correlations counts.
        complexity: of every (prompt, seed), e.g. `Item.facts`.
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
    rho, p, judge = found.rho, found.p_permutation, Judge(level.size, rules, len(nfe))
    bootstrap = judge.above("NFE grows with complexity", rho, 0.0, rules.correlation)
    outcome = SUPPORTED if p <= rules.alpha else NOT_SUPPORTED if bootstrap.outcome == NOT_SUPPORTED else UNDECIDED
    condition = "more than when complexities are dealt out at random"
    # The bootstrap's bounds belong to the other part: this one's p comes from another test and may differ from them.
    return [bootstrap, judge.needing(Part(condition, outcome, rho.estimate, p=p), rho, 0.0, rules.correlation)]


def _partial_parts(rows: Sequence[ResultRow], complexity: Mapping[Place, float], rules: Rules) -> list[Part]:
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
    judge = Judge(len(prompts), rules, len(methods))
    return [judge.above("also among pictures of one seed", found, 0.0, rules.correlation)]


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
) -> Verdict:
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
    read = _read(rows, groups, [score_of(rules.metric), costs_of("nfe")], rules)
    prompts = read.prompts
    if not any(row.method in set(refining) and Action.REFINE in row.actions for row in rows):
        return conclude("H4", prompts, [Part("the agent refines (it never does)", NOT_SUPPORTED)])
    found = _resample(read.against(), rules)
    spent = float(mean_over_pictures(read.values[AGENT][1], read.pictures).mean())
    gains = {name: found.mean(name) for name in named}
    judge = Judge(prompts, rules, len(refining), critical_value(gains.values(), rules.alpha))
    parts = [judge.above(f"better than {name} at equal NFE", gains[name], 0.0, rules.worthwhile) for name in named]
    return conclude(
        "H4",
        prompts,
        [
            _matched(part, spent, float(found.means[name][1]), name, rules)
            for part, name in zip(parts, named, strict=True)
        ],
    )


def _against(values: Values) -> Values:
    return {name: values[AGENT] - array for name, array in values.items() if name != AGENT}


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


# --------------------------------------------------------------------------- all of them

FULL_IMAGE, CONTINUED = "agent, mask=full", "agent, continued"  # H4's controls, by method name


def agent_runs(methods: Iterable[str]) -> list[str]:
    """Training runs of the agent among method names: ``agent``, or ``agent-s0``, ``agent-s1``, ..."""
    return [name for name in methods if re.fullmatch(r"agent(-s\d+)?", name)]


def solver_families(methods: Sequence[str]) -> dict[str, list[str]]:
    """`solver_fronts`, and best-of-N as a family of its own."""
    best = [name for name in methods if name.startswith("best-of-")]
    return solver_fronts(methods) | ({BEST_OF: best} if best else {})


def all_verdicts(
    rows: Sequence[ResultRow],
    complexity: Mapping[Place, float],
    agent: Sequence[str] | None = None,
    rules: Rules = Rules(),  # noqa: B008 (frozen)
) -> list[Verdict]:
    """H1-H4, as far as the rows allow; a hypothesis whose methods are missing is undecided.

    Args:
        rows: per-image rows.
        complexity: of every (prompt, seed), e.g. `Item.facts`.
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

    def h1(paired: Sequence[ResultRow], own: list[str], others: list[str]) -> Verdict:
        if reference not in others:
            return _undecided("H1", f"50-step inference ({' or '.join(wanted)}) was not run", _prompts(paired))
        return h1_efficiency(paired, own, reference, _known(solvers, others), rules)

    def h2(paired: Sequence[ResultRow], own: list[str], others: list[str]) -> Verdict:
        if not others:
            return _undecided("H2", "no solver was run", _prompts(paired))
        return h2_quality(paired, own, _known(families, others), rules)

    compared = [*([reference] if reference else ()), *_members(solvers)]
    return [
        _on_common(h1, "H1", rows, runs, compared, rules),
        _on_common(h2, "H2", rows, runs, _members(families), rules),
        _h3_on_common(rows, runs, complexity, rules),
        _h4_on_common(rows, runs, _controls(methods, runs), rules),
    ]


def _prompts(rows: Sequence[ResultRow]) -> int:
    return len({row.prompt for row in rows})


def _known(fronts: Groups, names: Sequence[str]) -> dict[str, list[str]]:
    """The fronts without the methods that ``names`` lack."""
    kept = {front: [name for name in members if name in names] for front, members in fronts.items()}
    return {front: members for front, members in kept.items() if members}


Decide = Callable[[Sequence[ResultRow], list[str], list[str]], Verdict]  # rows, the agent's runs, other methods


def _on_common(
    decided: Decide,
    hypothesis: str,
    rows: Sequence[ResultRow],
    agent: Sequence[str],
    others: Sequence[str],
    rules: Rules,
) -> Verdict:
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
    verdict = decided(paired, own, compared)
    mute = [Part(f"{name} has no {rules.metric}", UNDECIDED) for name in names if name not in having]
    return _noting(verdict, mute, notes)


def _noting(verdict: Verdict, further: Sequence[Part], notes: Sequence[str]) -> Verdict:
    """The verdict with further parts, and with words on what was left out."""
    if further:
        known = verdict.parts or (Part(verdict.reason, verdict.outcome),)
        verdict = conclude(verdict.hypothesis, verdict.prompts, [*known, *further])
    return replace(verdict, reason="; ".join([verdict.reason, *notes]))


def _h3_on_common(
    rows: Sequence[ResultRow], agent: Sequence[str], complexity: Mapping[Place, float], rules: Rules
) -> Verdict:
    """H3 on the pictures that all training runs have; it asks for no quality."""
    having = {row.method for row in rows}
    own = [name for name in agent if name in having]
    paired, notes = on_common_pictures(rows, own)
    if own and not paired:
        return _undecided("H3", f"the training runs have no picture in common: {'; '.join(notes)}", 0)
    lacking = [Part(f"{name} was not run", UNDECIDED) for name in agent if name not in having]
    return _noting(h3_adaptivity(paired, own, complexity, rules), lacking, notes)


def _h4_on_common(rows: Sequence[ResultRow], agent: Sequence[str], controls: Groups, rules: Rules) -> Verdict:
    """H4 with the controls of the agent's training runs, by the control's name."""
    names = _members(controls)

    def h4(paired: Sequence[ResultRow], own: list[str], others: list[str]) -> Verdict:
        if len(controls) < 2 or len(own) < len(agent) or set(others) != set(names):
            return _undecided("H4", "its controls were not run", _prompts(paired))
        return h4_refinement(paired, own, controls, rules)

    return _on_common(h4, "H4", rows, agent, names, rules)


def control_names(agent: str) -> tuple[str, str]:
    """H4's controls of an agent's rows, by method name."""
    return FULL_IMAGE.replace("agent", agent, 1), CONTINUED.replace("agent", agent, 1)


def decide(
    rows: Sequence[ResultRow],
    complexity: Mapping[Place, float],
    rules: Rules = Rules(),  # noqa: B008 (frozen)
    agents: Sequence[str] = ("agent",),
) -> list[Verdict]:
    """Verdicts on H1-H4 from any rows; none without rows of ``agents``, which are training runs of one group.

    Of several the first alone has H4's controls, so that H4 is about that one.
    """
    if not {row.method for row in rows} & set(agents):
        return []
    if len(agents) == 1:
        return all_verdicts(rows, complexity, agent=agents, rules=rules)
    controls = control_names(agents[0])
    others = [row for row in rows if row.method not in controls]
    *verdicts, last = all_verdicts(others, complexity, agent=agents, rules=rules)
    if set(controls) <= {row.method for row in rows}:
        last = _h4_on_common(rows, agents[:1], {name: [name] for name in controls}, rules)
    return [*verdicts, last]


def _references(rows: Sequence[ResultRow], agent: Sequence[str]) -> list[str]:
    """Names of 50-step inference: by the environment's own solver (a row's, such as ``euler-4``), and by DDIM."""
    own = [row.solver.rpartition("-")[0] for row in rows if row.method in set(agent)]
    return list(dict.fromkeys([f"{solver}-50" for solver in own if solver in SOLVERS] + ["ddim-50"]))


def _controls(methods: Sequence[str], agent: Sequence[str]) -> dict[str, list[str]]:
    """H4's controls of every training run, those that all runs have."""
    named = {name: [name.replace("agent", run, 1) for run in agent] for name in (FULL_IMAGE, CONTINUED)}
    return {name: own for name, own in named.items() if own and set(own) <= set(methods)}


def _undecided(hypothesis: str, reason: str, prompts: int) -> Verdict:
    return Verdict(hypothesis, UNDECIDED, reason, prompts)


# --------------------------------------------------------------------------- words


def describe(verdict: Verdict) -> str:
    """A verdict as text: one line, and one for each condition with its numbers."""
    needed = f"; about {verdict.required:,} prompts would decide" if verdict.required else ""
    needed += f"; at least {verdict.runs:,} training runs are needed" if verdict.runs else ""
    prompts = counted(verdict.prompts, "prompt")
    lines = [f"{verdict.hypothesis}: {verdict.outcome} ({prompts}; {verdict.reason}{needed})"]
    for part in verdict.parts:
        numbers = "" if part.estimate is None else f": {part.estimate:.4g}"
        numbers += "" if part.low is None else f" [{part.low:.4g}, {part.high:.4g}]"
        p = "" if part.p is None else f", p = {part.p:.2g}"
        note = f" ({part.note})" if part.note else ""
        lines.append(f"  {part.outcome}: {part.condition}{numbers}{p}{note}")
    return "\n".join(lines)
