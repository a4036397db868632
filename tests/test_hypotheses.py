"""Verdicts on H1-H4: planted rows get the right one, null rows are called supported about as often as alpha says."""

import math

import numpy as np
import pytest

from addiff_env.evaluation.hypotheses import (
    NOT_SUPPORTED,
    SUPPORTED,
    UNDECIDED,
    Part,
    Rules,
    conclude,
    describe,
    h1_efficiency,
    h2_quality,
    h3_adaptivity,
    h4_refinement,
    solver_fronts,
)
from addiff_env.types import Action, ResultRow

QUICK = Rules(draws=400)
DDIM = {"ddim": ["ddim-5", "ddim-10", "ddim-25", "ddim-50"]}


def rows_of(method, quality, nfe, flops=None, actions=(0,)):
    """One row per prompt; ``quality``, ``nfe`` and ``flops`` are numbers or one value per prompt."""
    number = len(quality)
    nfe = np.broadcast_to(nfe, number)
    flops = nfe * 1e9 if flops is None else np.broadcast_to(flops, number)
    return [
        ResultRow(
            method, f"p{k}", k, "c", "b", "s", method, "float32", "1",
            actions=list(actions), nfe=int(nfe[k]), net_flops=float(flops[k]), scores={"success": float(quality[k])},
        )
        for k in range(number)
    ]  # fmt: skip


def coins(rng, rates, number):
    """Successes of several methods on the same prompts: prompts differ in difficulty, so that pairs correlate."""
    difficulty = rng.random(number)
    return [(difficulty + rng.normal(0, 0.05, number) < rate).astype(float) for rate in rates]


def fixed(rng, number, rates=(0.45, 0.53, 0.60, 0.60)):
    columns = coins(rng, rates, number)
    steps = (5, 10, 25, 50)
    return [row for s, q in zip(steps, columns, strict=True) for row in rows_of(f"ddim-{s}", q, s)], columns


# --------------------------------------------------------------------------- H1


def test_h1_is_supported_where_the_agent_is_as_good_for_less_than_any_solver(rng):
    rows, columns = fixed(rng, 1500)
    rows += rows_of("agent", np.maximum(columns[3], rng.random(1500) < 0.1), 14)
    verdict = h1_efficiency(rows, ["agent"], "ddim-50", DDIM, QUICK)
    assert verdict.outcome == SUPPORTED and verdict.required is None and verdict.prompts == 1500
    assert {part.condition for part in verdict.parts} == {
        "mean NFE at most 30",
        "quality not inferior to ddim-50",
        "not inferior to the front of ddim at equal net FLOPs",
        "better than ddim-5, which costs no more",
        "better than ddim-10, which costs no more",
    }


def test_a_plain_25_step_solver_refutes_h1(rng):
    # The published prototype's mistake: 28 NFE, the quality of 50 steps, and 25 plain steps do the same.
    rows, columns = fixed(rng, 1500)
    rows += rows_of("agent", columns[3], 28)
    verdict = h1_efficiency(rows, ["agent"], "ddim-50", DDIM, QUICK)
    assert verdict.outcome == NOT_SUPPORTED
    assert verdict.reason == "fails: better than ddim-25, which costs no more"
    without = {"ddim": ["ddim-5", "ddim-10", "ddim-50"]}
    assert h1_efficiency(rows, ["agent"], "ddim-50", without, QUICK).outcome == SUPPORTED


def test_h1_counts_what_looking_costs(rng):
    # 14 NFE, but previews and encoders make it dearer than 25 plain steps.
    rows, columns = fixed(rng, 1500)
    rows += rows_of("agent", columns[3], 14, flops=26e9)
    verdict = h1_efficiency(rows, ["agent"], "ddim-50", DDIM, QUICK)
    assert verdict.outcome == NOT_SUPPORTED and "ddim-25" in verdict.reason


def test_h1_refuses_an_agent_that_always_continues(rng):
    rows, columns = fixed(rng, 300)
    rows += rows_of("agent", columns[3], 50)
    verdict = h1_efficiency(rows, ["agent"], "ddim-50", DDIM, QUICK)
    assert verdict.outcome == NOT_SUPPORTED and "mean NFE at most 30" in verdict.reason


def test_h1_refuses_a_worse_agent_and_leaves_few_prompts_undecided(rng):
    rows, _ = fixed(rng, 1500)
    (worse,) = coins(rng, [0.4], 1500)
    verdict = h1_efficiency([*rows, *rows_of("agent", worse, 14)], ["agent"], "ddim-50", DDIM, QUICK)
    assert verdict.outcome == NOT_SUPPORTED and "not inferior to ddim-50" in verdict.reason
    few, _ = fixed(rng, 30, rates=(0.2, 0.3, 0.6, 0.6))
    few += rows_of("agent", (rng.random(30) < 0.6).astype(float), 14)
    verdict = h1_efficiency(few, ["agent"], "ddim-50", DDIM, QUICK)
    assert verdict.outcome == UNDECIDED and verdict.required > 30


def test_h1_at_the_margin_is_supported_in_about_one_case_of_twenty(rng):
    # Truly worse by the margin, everything else granted.
    rules, outcomes = Rules(draws=200, margin=0.1), []
    for _ in range(150):
        reference = (rng.random(100) < 0.7).astype(float)
        rows = rows_of("ddim-50", reference, 50) + rows_of("agent", (rng.random(100) < 0.6).astype(float), 14)
        verdict = h1_efficiency(rows, ["agent"], "ddim-50", {"ddim": ["ddim-50"]}, rules)
        outcomes.append(verdict.parts[1].outcome)
    assert np.mean([o == SUPPORTED for o in outcomes]) == pytest.approx(0.05, abs=0.045)


# --------------------------------------------------------------------------- H2

FRONTS = {"ddim": ["ddim-5", "ddim-10", "ddim-25", "ddim-50"], "best-of-n": ["bon-2"]}


def test_h2_needs_every_front_below(rng):
    rows, columns = fixed(rng, 1500)
    agent = rows_of("agent", np.maximum(columns[3], rng.random(1500) < 0.3), 14)
    low, high = coins(rng, [0.6, 0.95], 1500)
    beaten = h2_quality([*rows, *agent, *rows_of("bon-2", low, 20)], ["agent"], FRONTS, QUICK)
    assert beaten.outcome == SUPPORTED and len(beaten.parts) == 3
    lost = h2_quality([*rows, *agent, *rows_of("bon-2", high, 14)], ["agent"], FRONTS, QUICK)
    assert lost.outcome == NOT_SUPPORTED and "best-of-n" in lost.reason
    assert lost.parts[0].outcome == SUPPORTED


def test_h2_on_the_front_is_supported_in_about_one_case_of_twenty(rng):
    outcomes = []
    for k in range(150):
        rows = [row for m, r, n in (("a", 0.5, 10), ("b", 0.7, 20)) for row in rows_of(m, rng.random(100) < r, n)]
        rows += rows_of("agent", rng.random(100) < 0.6, 15)
        verdict = h2_quality(rows, ["agent"], {"s": ["a", "b"]}, Rules(draws=200, seed=k))
        outcomes.append(verdict.outcome)
    assert outcomes.count(SUPPORTED) / len(outcomes) == pytest.approx(0.05, abs=0.045)


def test_the_number_that_would_decide_does_decide(rng):
    def verdict(number):
        rows = [row for m, r, n in (("a", 0.5, 10), ("b", 0.6, 20)) for row in rows_of(m, rng.random(number) < r, n)]
        rows += rows_of("agent", rng.random(number) < 0.62, 15)
        return h2_quality(rows, ["agent"], {"s": ["a", "b"]}, Rules(draws=200))

    first = next(v for v in (verdict(80) for _ in range(20)) if v.outcome == UNDECIDED)
    part = first.parts[0]
    # By hand: the one-sided sample size of a normal test with the standard error seen.
    gap = max(part.estimate, 0.01 - part.estimate)
    error = (part.high - part.low) / (2 * 1.645)
    assert first.required == pytest.approx(80 * ((1.645 + 0.842) * error / gap) ** 2, rel=0.2)
    decided = [verdict(2500).outcome for _ in range(10)]  # gap .07, se .016 at 2,500
    assert decided.count(SUPPORTED) >= 8


# --------------------------------------------------------------------------- H3


def places(level):
    return {(f"p{k}", k): float(value) for k, value in enumerate(level)}


def test_h3_sees_more_steps_for_complex_prompts(rng):
    level = rng.integers(1, 6, 300)
    nfe = 8 + 2 * level + rng.integers(0, 5, 300)
    verdict = h3_adaptivity(rows_of("agent", np.ones(300), nfe), ["agent"], places(level), QUICK)
    assert verdict.outcome == SUPPORTED and len(verdict.parts) == 2
    backwards = h3_adaptivity(rows_of("agent", np.ones(300), 30 - nfe // 2), ["agent"], places(level), QUICK)
    assert backwards.outcome == NOT_SUPPORTED


def test_h3_refuses_a_collapsed_policy(rng):
    verdict = h3_adaptivity(rows_of("agent", np.ones(50), 50), ["agent"], places(rng.integers(1, 4, 50)), QUICK)
    assert verdict.outcome == NOT_SUPPORTED and "it is 50 for every prompt" in verdict.reason


def test_h3_null_rows_are_supported_in_about_one_case_of_twenty(rng):
    outcomes = []
    for k in range(200):
        level, nfe = rng.integers(1, 5, 60), rng.integers(5, 30, 60)
        rules = Rules(draws=200, seed=k)
        outcomes.append(h3_adaptivity(rows_of("agent", np.ones(60), nfe), ["agent"], places(level), rules).outcome)
    assert outcomes.count(SUPPORTED) / len(outcomes) == pytest.approx(0.05, abs=0.045)
    assert UNDECIDED in outcomes


def test_h3_holds_the_seed_constant_where_seeds_repeat(rng):
    # Complexity follows the seed and so does NFE: nothing is left among pictures of one seed.
    rows, complexity = [], {}
    for k in range(400):
        seed = k % 8
        level = seed // 2 + int(rng.integers(0, 2))
        nfe = 5 + 3 * seed + int(rng.integers(0, 3))
        complexity[f"p{k}", seed] = float(level)
        rows.append(
            ResultRow("agent", f"p{k}", seed, "c", "b", "s", "p", "float32", "1", nfe=nfe, scores={"success": 1.0})
        )
    verdict = h3_adaptivity(rows, ["agent"], complexity, QUICK)
    partial = verdict.parts[-1]
    assert partial.condition == "also among pictures of one seed" and partial.outcome != SUPPORTED
    assert verdict.outcome != SUPPORTED and verdict.parts[0].outcome == SUPPORTED


def test_h3_needs_complexities(rng):
    rows = rows_of("agent", np.ones(10), rng.integers(1, 9, 10))
    with pytest.raises(ValueError, match=r"no complexity of 10 pictures, e.g. \('p0', 0\)"):
        h3_adaptivity(rows, ["agent"], {}, QUICK)
    with pytest.raises(ValueError, match="every prompt has complexity 2"):
        h3_adaptivity(rows, ["agent"], places(np.full(10, 2)), QUICK)


# --------------------------------------------------------------------------- H4

REFINING = (Action.CONTINUE, Action.REFINE, Action.STOP)


def arms(rng, number, rates):
    refined, full, further = coins(rng, rates, number)
    return [
        *rows_of("agent", refined, 14, actions=REFINING),
        *rows_of("full", full, 14, actions=REFINING),
        *rows_of("continue", further, 14),
    ]


def test_h4_needs_both_controls_beaten(rng):
    controls = ["full", "continue"]
    assert h4_refinement(arms(rng, 800, (0.7, 0.6, 0.6)), ["agent"], controls, QUICK).outcome == SUPPORTED
    lost = h4_refinement(arms(rng, 800, (0.6, 0.7, 0.5)), ["agent"], controls, QUICK)
    assert lost.outcome == NOT_SUPPORTED and lost.reason == "fails: better than full at equal NFE"
    few = h4_refinement(arms(rng, 40, (0.6, 0.55, 0.4)), ["agent"], controls, QUICK)
    assert few.outcome in (UNDECIDED, NOT_SUPPORTED)


def test_h4_null_rows_are_supported_in_about_one_case_of_twenty(rng):
    outcomes = []
    for k in range(300):
        rows = arms(rng, 80, (0.6, 0.6, 0.6))
        outcomes.append(h4_refinement(rows, ["agent"], ["full"], Rules(draws=200, seed=k)).outcome)
    assert outcomes.count(SUPPORTED) / len(outcomes) == pytest.approx(0.05, abs=0.04)


def test_h4_without_a_refinement_or_with_other_compute(rng):
    rows = rows_of("agent", np.ones(20), 14) + rows_of("full", np.zeros(20), 14)
    verdict = h4_refinement(rows, ["agent"], ["full"], QUICK)
    assert verdict.outcome == NOT_SUPPORTED and "never does" in verdict.reason
    rows = rows_of("agent", np.ones(20), 14, actions=REFINING) + rows_of("full", np.zeros(20), 12)
    with pytest.raises(ValueError, match=r"'full' spent 12.00 NFE where refining spent 14.00"):
        h4_refinement(rows, ["agent"], ["full"], QUICK)


# --------------------------------------------------------------------------- rules


def test_training_runs_widen_the_verdict(rng):
    # Two good runs and a bad one: pooled as prompts they would pass, as runs they do not.
    rows = [row for m, q in (("s0", 0.9), ("s1", 0.9), ("s2", 0.35)) for row in rows_of(m, rng.random(600) < q, 15)]
    rows += rows_of("a", rng.random(600) < 0.6, 10) + rows_of("b", rng.random(600) < 0.62, 20)
    together = h2_quality(rows, ["s0", "s1", "s2"], {"s": ["a", "b"]}, QUICK)
    assert together.outcome == UNDECIDED
    assert h2_quality(rows, ["s0", "s1"], {"s": ["a", "b"]}, QUICK).outcome == SUPPORTED


def test_a_conjunction_is_refuted_by_one_part_and_asks_for_its_neediest():
    good = Part("good", SUPPORTED)
    wide, wider = Part("wide", UNDECIDED, required=50), Part("wider", UNDECIDED, required=900)
    assert conclude("H", 10, [good]).outcome == SUPPORTED
    open_ = conclude("H", 10, [good, wide, wider])
    assert (open_.outcome, open_.required, open_.reason) == (UNDECIDED, 900, "open: wide; wider")
    lost = conclude("H", 10, [wide, Part("bad", NOT_SUPPORTED)])
    assert (lost.outcome, lost.required) == (NOT_SUPPORTED, None)


def test_rules_and_names_are_checked(rng):
    with pytest.raises(ValueError, match="margin must be positive, got 0"):
        Rules(margin=0)
    with pytest.raises(ValueError, match="alpha must lie between 0 and 0.5, got 0.7"):
        Rules(alpha=0.7)
    rows, columns = fixed(rng, 20)
    with pytest.raises(ValueError, match=r"\['ddim-50'\] cannot be the agent and its baseline"):
        h1_efficiency(rows, ["ddim-50"], "ddim-50", DDIM, QUICK)
    with pytest.raises(ValueError, match="every front need a method"):
        h2_quality(rows, ["agent"], {"ddim": []}, QUICK)
    assert math.isclose(Rules().level, 0.9)


def test_methods_are_sorted_into_fronts_by_solver():
    names = ["ddim-5", "agent", "dpmpp_2m-10", "ddim-50", "best-of-2", "agent-s0", "-7"]
    assert solver_fronts(names) == {
        "ddim": ["ddim-5", "ddim-50"],
        "dpmpp_2m": ["dpmpp_2m-10"],
        "best-of": ["best-of-2"],
    }


def test_a_verdict_reads_as_text():
    parts = [Part("good", SUPPORTED, 0.25, 0.125, 0.5, 0.001), Part("wide", UNDECIDED, required=12_000)]
    lines = describe(conclude("H2", 64, parts)).split("\n")
    assert lines == [
        "H2: undecided (64 prompts; open: wide; about 12,000 prompts would decide)",
        "  supported: good: 0.25 [0.125, 0.5], p = 0.001",
        "  undecided: wide",
    ]
