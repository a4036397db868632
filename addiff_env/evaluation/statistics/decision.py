"""What a hypothesis is decided by: rules fixed beforehand, conditions tested one by one, and their conjunction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from scipy import stats

from addiff_env.evaluation.statistics.bootstrap import Interval, tail_share
from addiff_env.evaluation.statistics.front import MinDifference
from addiff_env.evaluation.statistics.power import required_prompts, required_runs
from addiff_env.evaluation.statistics.summary import counted

SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided"
NOT_APPLICABLE = "not applicable"  # a part about which nothing can be asked: it neither supports nor blocks


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
class Decision:
    """What the rows say of a hypothesis."""

    hypothesis: str
    outcome: str
    reason: str
    prompts: int
    parts: tuple[Part, ...] = field(default=())
    p_corrected: float | None = None  # over the hypotheses of its tier; None before that, and where there is no p

    @property
    def _tests(self) -> list[Part]:
        return [part for part in self.parts if part.outcome != NOT_APPLICABLE]

    @property
    def p(self) -> float | None:
        """Of the conjunction: the largest of its parts' (Berger 1982). None where a part has none, see `lacking`."""
        numbers = [part.p for part in self._tests]
        return max(p for p in numbers if p is not None) if numbers and None not in numbers else None

    @property
    def deciding(self) -> Part | None:
        """The part that the p-value is of; of several the first."""
        return None if self.p is None else next(part for part in self._tests if part.p == self.p)

    @property
    def lacking(self) -> str:
        """Why there is no p-value; empty where there is one."""
        if self.p is not None:
            return ""
        return next((part.condition for part in self._tests if part.p is None), self.reason)

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


def conclude(hypothesis: str, prompts: int, parts: Sequence[Part]) -> Decision:
    """Join the parts of a conjunction."""
    against = [part for part in parts if part.outcome == NOT_SUPPORTED]
    open_ = [part for part in parts if part.outcome == UNDECIDED]
    if against:
        return Decision(
            hypothesis, NOT_SUPPORTED, "fails: " + "; ".join(p.condition for p in against), prompts, (*parts,)
        )
    if open_:
        return Decision(hypothesis, UNDECIDED, "open: " + "; ".join(p.condition for p in open_), prompts, (*parts,))
    return Decision(hypothesis, SUPPORTED, "every condition holds", prompts, (*parts,))


@dataclass(frozen=True)
class ConditionTester:
    """Makes parts of differences."""

    prompts: int
    rules: Rules
    runs: int = 1  # training runs of the agent
    critical: float | None = None  # of bounds that refute, see `critical_value`; None: the intervals' own ends

    def above(self, condition: str, found: Interval | MinDifference, bound: float, worthwhile: float = 0.0) -> Part:
        """Is the true value above ``bound``? Not supported where it is surely less than ``worthwhile`` above it."""
        high = found.high if self.critical is None else found.ceiling(self.critical)
        p = found.p_below(bound)  # at most alpha just where the lower bound lies above
        outcome = SUPPORTED if p <= self.rules.alpha else NOT_SUPPORTED if high < bound + worthwhile else UNDECIDED
        part = Part(condition, outcome, found.estimate, found.low, high, p)
        note = f"nearest: {found.nearest}" if isinstance(found, MinDifference) else ""
        return self.needing(replace(part, note=note), found, bound, worthwhile)

    def at_most(self, condition: str, found: Interval, bound: float) -> Part:
        """Is the true value at most ``bound``?"""
        low = found.low if self.critical is None else -found.negated().ceiling(self.critical)
        # Who spends just what is allowed keeps within it. p is at most alpha just where the upper bound does so, too.
        enough = found.high <= bound + found.rounding
        p = tail_share(found.draws > bound + found.rounding)
        outcome = SUPPORTED if enough else NOT_SUPPORTED if low > bound + found.rounding else UNDECIDED
        return self.needing(Part(condition, outcome, found.estimate, low, found.high, p), found.negated(), -bound)

    def needing(self, part: Part, found: Interval | MinDifference, bound: float, worthwhile: float = 0.0) -> Part:
        """The part with the prompts, or else the training runs, that would decide it, whichever way takes fewer.

        It is supported once every comparison lies above ``bound`` that does not yet, and refuted once a single one
        surely lies below ``bound + worthwhile``, by the bounds that hold for all comparisons at once.
        """
        if part.outcome != UNDECIDED:
            return part
        everything = list(found.differences.values()) if isinstance(found, MinDifference) else [found]
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


def describe(decision: Decision) -> str:
    """A decision as text: one line, and one for each condition with its numbers."""
    needed = f"; about {decision.required:,} prompts would decide" if decision.required else ""
    needed += f"; at least {decision.runs:,} training runs are needed" if decision.runs else ""
    prompts = counted(decision.prompts, "prompt")
    lines = [f"{decision.hypothesis}: {decision.outcome} ({prompts}; {decision.reason}{needed})"]
    lines += [f"  {_p_text(decision)}"] if decision.parts else []
    for part in decision.parts:
        numbers = estimate_text(part)
        numbers = f": {numbers}" if numbers else ""
        p = "" if part.p is None else f", p = {part.p:.2g}"
        note = f" ({part.note})" if part.note else ""
        lines.append(f"  {part.outcome}: {part.condition}{numbers}{p}{note}")
    return "\n".join(lines)


def estimate_text(part: Part | None) -> str:
    """Estimate and bounds of a part; empty where it has none."""
    if part is None or part.estimate is None:
        return ""
    return f"{part.estimate:.4g}" + ("" if part.low is None else f" [{part.low:.4g}, {part.high:.4g}]")


def _p_text(decision: Decision) -> str:
    if decision.p is None:
        return f"p n/a: {decision.lacking}"
    corrected = "" if decision.p_corrected is None else f", {decision.p_corrected:.2g} corrected within its tier"
    of = f" (of: {decision.deciding.condition})" if decision.deciding and len(decision.parts) > 1 else ""
    return f"p = {decision.p:.2g}{corrected}{of}"
