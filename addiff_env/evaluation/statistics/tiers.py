"""Two tiers of hypotheses: those that the project was asked to decide, and stricter ones of its own.

The wording of the first tier is what was asked, see docs/evaluation.md; nothing is added to it, and a plain solver of
fewer steps may meet some of it too. The second tier asks what a sceptic would. Each hypothesis has a verdict, an
interval and a p-value of its own, and p-values are corrected (Holm 1979) over all hypotheses of their tier, whether or
not the rows tell something of each: what is run later makes no earlier claim stronger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from scipy import stats

from addiff_env.evaluation.statistics.comparisons import holm
from addiff_env.evaluation.statistics.decision import SUPPORTED, UNDECIDED, Decision, Part, Rules, conclude, describe
from addiff_env.evaluation.statistics.power import required_prompts


@dataclass(frozen=True)
class Tier:
    """Hypotheses that are corrected together, with what each claims (``{max_nfe}`` is that of the rules)."""

    title: str
    claims: dict[str, str]


AS_STATED = Tier(
    "As stated",
    {
        "H1": "Efficiency: quality equal to 50-step inference at no more than {max_nfe:g} NFE on average.",
        "H2": "Quality: higher quality than any fixed-step method at equal compute.",
        "H3": "Adaptivity: simple prompts stop early, complex ones get more evaluations.",
        "H4": "Refinement: selective region refinement beats the same compute spent on additional full-image steps.",
    },
)
STRICTER = Tier(
    "Stricter, the project's own",
    {
        "H2+": "Quality: higher also than best-of-N and inference-time search at equal compute.",
        "H4+": "Refinement: refining regions beats refining the whole picture, decision by decision.",
        "H5": "Learning: the learned policy is better than the tuned hand-made rules at equal compute.",
    },
)
TIERS = (AS_STATED, STRICTER)


def tier_of(hypothesis: str) -> Tier | None:
    """The tier of a hypothesis by name; None of others."""
    return next((tier for tier in TIERS if stated_name(hypothesis) in tier.claims), None)


def stated_name(hypothesis: str) -> str:
    """Its name in the tier: ``H2`` of ``H2 at price 0.001``."""
    return hypothesis.partition(" at ")[0]


def by_tier(decisions: Sequence[Decision]) -> list[tuple[Tier, list[Decision]]]:
    """Tiers with those of their hypotheses that there are; verdicts of unknown names are nowhere."""
    pairs = [(tier, [one for one in decisions if tier_of(one.hypothesis) is tier]) for tier in TIERS]
    return [(tier, found) for tier, found in pairs if found]


def claims_of(rules: Rules) -> dict[str, str]:
    """What each hypothesis claims, by name."""
    return {name: text.format(max_nfe=rules.max_nfe) for tier in TIERS for name, text in tier.claims.items()}


def correct_within_tiers(decisions: Sequence[Decision], rules: Rules) -> list[Decision]:
    """Decisions with p-values corrected over their tier; what is supported only without correction is undecided.

    A hypothesis without a p-value counts as one with p = 1. Refutations stay as they are: each is at ``alpha``.
    """
    return [_corrected(one, decisions, rules) for one in decisions]


def _corrected(one: Decision, decisions: Sequence[Decision], rules: Rules) -> Decision:
    tier, p = tier_of(one.hypothesis), one.p
    if tier is None or p is None:
        return one
    found = {other.hypothesis: other.p for other in decisions}
    family = [1.0 if (own := found.get(name)) is None else own for name in tier.claims]
    corrected = holm(family)[list(tier.claims).index(one.hypothesis)]
    if one.outcome == SUPPORTED and corrected > rules.alpha:
        parts = [_at_level(part, rules.alpha * p / corrected, one.prompts, rules) for part in one.parts]
        one = replace(conclude(one.hypothesis, one.prompts, parts), reason=_words(one.reason, parts))
    return replace(one, p_corrected=corrected)


def _words(reason: str, parts: Sequence[Part]) -> str:
    """Why, in place of the words of a decision that was supported; further notes on it stay."""
    _, *notes = reason.split("; ")
    open_ = "; ".join(part.condition for part in parts if part.outcome == UNDECIDED)
    return "; ".join([f"open after the correction within its tier: {open_}", *notes])


def _at_level(part: Part, level: float, prompts: int, rules: Rules) -> Part:
    """The part undecided where its p is above ``level``, with the prompts that would do."""
    if part.outcome != SUPPORTED or part.p is None or part.p <= level:
        return part
    deviation = float(stats.norm.isf(part.p))  # of the estimate from its bound, in standard errors
    required = required_prompts(deviation, 1.0, prompts, level, rules.power)
    return replace(part, outcome=UNDECIDED, required=required)


def describe_tiers(decisions: Sequence[Decision]) -> str:
    """All decisions as text, under the titles of their tiers."""
    known = by_tier(decisions)
    lines = [line for tier, found in known for line in (f"{tier.title}:", *map(describe, found))]
    return "\n".join([*lines, *(describe(one) for one in decisions if tier_of(one.hypothesis) is None)])
