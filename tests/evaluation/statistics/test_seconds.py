"""Verdicts and speeds at equal seconds: the rows' and the timings' arithmetic, and their calibration on null rows."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addiff_env.evaluation.statistics.decide import decide
from addiff_env.evaluation.statistics.decision import NOT_APPLICABLE, NOT_SUPPORTED, SUPPORTED, UNDECIDED, Rules
from addiff_env.evaluation.statistics.hypotheses import h2_quality, h2_search, h5_learning
from addiff_env.evaluation.statistics.speed import equal_quality_speeds
from addiff_env.evaluation.statistics.spending import NET_FLOPS, NFE, Spending, at_seconds
from addiff_env.evaluation.statistics.summary import COSTS
from addiff_env.evaluation.statistics.timings import MethodTiming, Timings
from addiff_env.types import ResultRow

QUICK = Rules(draws=300)
FRONTS = {"ddim": ["ddim-5", "ddim-10", "ddim-20"], "euler": ["euler-10"]}
SEARCHES = {"best-of-N": ["best-of-2:ddim-5"], "Feynman-Kac steering": ["fk-2:ddim-5"]}
RULE = "threshold:5:0.1"
NAMES = [*FRONTS["ddim"], *FRONTS["euler"], "best-of-2:ddim-5", "fk-2:ddim-5", RULE, "agent"]


def rows_of(method, quality, flops=1.0, **more):
    """One row per prompt; ``flops`` is a number, or one per prompt."""
    flops = np.broadcast_to(flops, len(quality))
    return [
        ResultRow(
            method, f"p{k}", k, "c", "b", "s", method, "float32", "1", actions=[0], nfe=10, net_flops=float(flops[k]),
            scores={"success": float(value)}, **more,
        )
        for k, value in enumerate(quality)
    ]  # fmt: skip


def timed(seconds, flops=1.0):
    """Timings of methods, from their rounds' seconds."""
    return Timings({name: MethodTiming(tuple(np.atleast_1d(s).tolist()), 10, flops) for name, s in seconds.items()})


# --------------------------------------------------------------------------- rows


def test_a_row_takes_seconds_in_proportion_to_what_it_spent():
    timings = timed({"agent": [2.0, 4.0, 3.0]}, flops=6.0)
    easy, hard = timings.onto(rows_of("agent", [1, 1], [3.0, 12.0]))
    assert (easy.timed_seconds, hard.timed_seconds) == (1.5, 6.0)
    (other,) = timings.onto(rows_of("ddim-5", [1]))
    assert other.timed_seconds is None and "not among" in timings.why_untimed([other])["ddim-5"]
    assert easy.seconds == 0.0  # the row's own stay as they are


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.floats(0.01, 100))
def test_a_sample_of_the_same_pictures_takes_its_median(seconds, flops):
    rows = rows_of("agent", [1] * 5, flops * np.array([0.5, 1.5, 1, 0.25, 1.75]))
    found = timed({"agent": seconds}, flops).onto(rows)
    assert np.mean([row.timed_seconds for row in found]) == pytest.approx(np.median(seconds))


def test_rows_by_something_else_than_was_timed_have_no_seconds():
    made_by = {"backbone": "b", "solver": "s", "policy": "agent", "dtype": "float32"}
    timings = Timings({"agent": MethodTiming((1.0,), 10, 1.0, made_by)}, {"ddim-5": "RuntimeError: out of memory"})
    rows = [*rows_of("agent", [1]), *rows_of("ddim-5", [1])]
    assert timings.why_untimed(rows) == {"ddim-5": "RuntimeError: out of memory"}
    for part in made_by:
        (row,) = timings.onto([replace(rows[0], **{part: "other"})])
        assert row.timed_seconds is None and part in timings.why_untimed([row])["agent"]


def test_a_busy_machine_and_uneven_rounds_are_remarked():
    calm = {"date": "2026-01-01", "load_before": 0.1, "load_after": 2.2}
    timings = replace(timed({"a": [1.0, 1.01]}), machine={"threads": 2}, sessions=(calm,), code_version="1")
    assert timings.cautions(rows_of("a", [1])) == []
    for other, words in (
        (replace(timings, sessions=(calm, {**calm, "load_before": 3.0})), "load average 3.0 before"),
        (replace(timings, sessions=({**calm, "load_after": 4.0},)), "load average 4.0 after"),
        (replace(timings, code_version="2"), "timed by code 2, the rows are by 1"),
        (replace(timings, methods=timed({"a": [1.0, 2.0]}).methods), "of a by 67%"),
        (replace(timings, methods=timed({"a": [1.0]}).methods), "one round"),
    ):
        (said,) = other.cautions(rows_of("a", [1]))
        assert words in said


# --------------------------------------------------------------------------- verdicts


@st.composite
def outcomes(draw):
    """Rows of all methods with any success rates and mean costs."""
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    rates = [draw(st.floats(0.1, 0.9)) for _ in NAMES]
    costs = {name: draw(st.floats(0.1, 10)) for name in NAMES}
    rows = [row for name, rate in zip(NAMES, rates, strict=True) for row in rows_of(name, rng.random(30) < rate)]
    return rows, costs


@settings(max_examples=15, deadline=None)
@given(outcomes())
def test_a_front_is_the_same_whatever_the_cost_is_called(given_rows):
    """At each cost column the verdicts have the numbers that net FLOPs of the same size give."""
    rows, costs = given_rows
    timings = timed(costs)
    by_name = {
        "net_flops": NET_FLOPS,
        "nfe": NFE,
        "seconds": Spending(next(cost for cost in COSTS if cost.name == "seconds")),
        "timed_seconds": at_seconds(timings),
    }
    found = []
    for name, spending in by_name.items():
        own = [replace(row, **{"net_flops": 1.0, name: costs[row.method]}) for row in rows]
        own = timings.onto(own) if name == "timed_seconds" else own
        decided = (
            h2_quality(own, ["agent"], FRONTS, QUICK, spending),
            h2_search(own, ["agent"], FRONTS, SEARCHES, QUICK, spending),
            h5_learning(own, ["agent"], [RULE], FRONTS, QUICK, spending),
        )
        for one in decided:
            assert all(f"at equal {spending.cost.words}" in part.condition for part in one.parts)
        found.append([(p.outcome, p.estimate, p.low, p.high, p.p) for one in decided for p in one.parts])
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            assert mine[0] == theirs[0]
            assert [x is None or pytest.approx(x) == y for x, y in zip(mine[1:], theirs[1:], strict=True)] == [True] * 4


@settings(max_examples=10, deadline=None)
@given(outcomes(), st.floats(1e-3, 1e3), st.integers(1, 5))
def test_the_clock_has_no_unit(given_rows, unit, rounds):
    rows, costs = given_rows
    rng = np.random.default_rng(0)
    seconds = {name: cost * rng.uniform(0.9, 1.1, rounds) for name, cost in costs.items()}
    parts = []
    for scale in (1.0, unit):
        timings = timed({name: scale * values for name, values in seconds.items()})
        verdict = h2_quality(timings.onto(rows), ["agent"], FRONTS, QUICK, at_seconds(timings))
        parts.append([(part.outcome, part.p) for part in verdict.parts])
    assert parts[0] == parts[1]


def by_cost(rng, number, agent, **rates):
    """Rows of fixed methods and of an agent with a success rate."""
    rows = [row for name, rate in rates.items() for row in rows_of(name.replace("_", "-"), rng.random(number) < rate)]
    return [*rows, *rows_of("agent", rng.random(number) < agent)]


COMPLEXITY = {(f"p{k}", k): float(k % 4) for k in range(2000)}


def test_what_is_cheap_in_flops_may_be_dear_in_seconds(rng):
    rows = by_cost(rng, 800, 0.7, ddim_5=0.5, ddim_20=0.8, euler_5=0.4, euler_20=0.5)
    flops = {"ddim-5": 5, "ddim-20": 20, "euler-5": 5, "euler-20": 20, "agent": 6}
    rows = [replace(row, net_flops=float(flops[row.method])) for row in rows]
    timings = Timings(
        {name: MethodTiming((cost * (3 if name == "agent" else 1),), 10, cost) for name, cost in flops.items()}
    )
    plain = {one.hypothesis: one for one in decide(rows, COMPLEXITY, QUICK)}
    found = {one.hypothesis: one for one in decide(rows, COMPLEXITY, QUICK, timings=timings)}
    assert found["H2"] == plain["H2"] and found["H2"].outcome == SUPPORTED  # timings make no other claim stronger
    assert found["H2 at equal seconds"].outcome == NOT_SUPPORTED
    assert found["H2 at equal seconds"].p > 0.1 > found["H2"].p
    assert found["H2 at equal seconds"].p_corrected >= found["H2 at equal seconds"].p


def test_without_timings_nothing_is_asked_at_equal_seconds(rng):
    rows = by_cost(rng, 40, 0.7, ddim_5=0.5, ddim_20=0.6)
    for timings, words in (
        (None, "no timings: `addiff time RUN` makes them"),
        (Timings(untimed={"agent": "ValueError: no"}), "agent was not timed: ValueError: no"),
        (timed({"ddim-5": 1.0, "ddim-20": 4.0}), "agent was not timed: it was not among the methods timed"),
    ):
        found = {one.hypothesis: one for one in decide(rows, COMPLEXITY, QUICK, timings=timings)}
        for name in ("H2", "H2+", "H5"):
            one = found[f"{name} at equal seconds"]
            assert (one.outcome, one.reason, one.p) == (NOT_APPLICABLE, words, None)
        assert found["H2"].parts


def test_a_rival_that_was_not_timed_leaves_its_hypothesis_open(rng):
    rows = by_cost(rng, 600, 0.95, ddim_5=0.3, ddim_20=0.4, euler_10=0.3)
    seconds = {"agent": 2.0, "ddim-5": 1.0, "ddim-20": 4.0, "euler-10": 3.0, "euler-5": 1.0}
    rows += rows_of("euler-5", rng.random(600) < 0.2)
    names = [name for name in seconds if name != "ddim-20"]
    whole = {one.hypothesis: one for one in decide(rows, COMPLEXITY, QUICK, timings=timed(seconds))}
    part = {
        one.hypothesis: one for one in decide(rows, COMPLEXITY, QUICK, timings=timed({n: seconds[n] for n in names}))
    }
    assert whole["H2 at equal seconds"].outcome == SUPPORTED
    assert part["H2 at equal seconds"].outcome == UNDECIDED
    assert "ddim-20 has no seconds" in [one.condition for one in part["H2 at equal seconds"].parts]


def test_a_cost_that_rows_do_not_say_is_named(rng):
    rows = by_cost(rng, 20, 0.7, ddim_5=0.5)
    with pytest.raises(ValueError, match=r"no timed_seconds in the row of \((agent|ddim-5), 'p0', seed 0\)"):
        h2_quality(rows, ["agent"], {"ddim": ["ddim-5"]}, QUICK, at_seconds(timed({"ddim-5": 1.0})))


def null_at_seconds(rng, seed, prompts=100):
    """The agent lies on the chord of two methods at its true seconds; rounds are noisy, the same for all by half."""
    rows = by_cost(rng, prompts, 0.6, ddim_10=0.5, ddim_20=0.7)
    shared = rng.normal(0, 0.05, 5)
    seconds = {
        name: cost * np.exp(shared + rng.normal(0, 0.05, 5))
        for name, cost in (("ddim-10", 1), ("ddim-20", 2), ("agent", 1.5))
    }
    timings = timed(seconds)
    rules = Rules(draws=200, seed=seed)
    return h2_quality(
        timings.onto(rows), ["agent"], {"ddim": ["ddim-10", "ddim-20"]}, rules, at_seconds(timings)
    ).parts[0]


def test_an_agent_on_the_front_of_seconds_is_called_better_in_one_case_of_twenty(rng):
    supported = [null_at_seconds(rng, k).outcome == SUPPORTED for k in range(250)]
    assert np.mean(supported) == pytest.approx(0.05, abs=0.035)


@pytest.mark.slow
def test_verdicts_at_equal_seconds_are_calibrated(rng):
    p = np.array([null_at_seconds(rng, k).p for k in range(1500)])
    print(f"p <= 0.05 in {np.mean(p <= 0.05):.3f}, p <= 0.5 in {np.mean(p <= 0.5):.3f}")
    assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=0.015)
    assert np.mean(p <= 0.5) <= 0.5 + 0.03  # the least of three differences


# --------------------------------------------------------------------------- pictures a second


def test_speeds_by_hand(rng):
    quality = {"ddim-5": 0.5, "ddim-10": 0.75, "ddim-20": 0.75, "best-of-2:ddim-5": 0.85, "agent": 0.7, RULE: 0.25}
    rows = [row for name, share in quality.items() for row in rows_of(name, np.arange(40) < 40 * share)]
    seconds = {"ddim-5": 1.0, "ddim-10": 2.0, "ddim-20": 4.0, "best-of-2:ddim-5": 2.5, "agent": 1.0, RULE: 2.0}
    found = {one.method: one for one in equal_quality_speeds(rows, timed(seconds), QUICK)}
    assert list(found) == list(quality)
    agent = found["agent"]
    assert (agent.rival, agent.rival_seconds, agent.ratio, agent.per_second) == ("ddim-10", 2.0, 2.0, 1.0)
    assert agent.low == 2.0 <= agent.high  # the agent's pictures pass wherever ddim-10's do not: never as good in fewer
    assert found[RULE].rival == "ddim-5" and found[RULE].ratio == 0.5
    assert found["ddim-20"].rival == "ddim-10" and found["ddim-5"].ratio == 1.0
    none = found["best-of-2:ddim-5"]
    assert none.rival is None and none.ratio == math.inf


def test_speeds_of_few_prompts_or_no_timings():
    rows = [*rows_of("ddim-5", [1, 0, 1]), *rows_of("agent", [1, 0, 0])]
    (fixed, agent) = equal_quality_speeds(rows, timed({"ddim-5": 2.0, "agent": 1.0}), QUICK)
    assert agent.ratio == 2.0 and agent.low is None and fixed.rival == "ddim-5"
    assert equal_quality_speeds(rows, Timings(), QUICK) == []
    (only,) = equal_quality_speeds(rows, timed({"agent": 1.0}), QUICK)
    assert only.rival is None


@settings(max_examples=20, deadline=None)
@given(outcomes())
def test_the_rival_is_the_cheapest_fixed_method_that_is_as_good(given_rows):
    rows, costs = given_rows
    quality = {name: np.mean([row.scores["success"] for row in rows if row.method == name]) for name in NAMES}
    fixed = [name for members in FRONTS.values() for name in members]
    for one in equal_quality_speeds(rows, timed(costs), Rules(draws=50)):
        enough = [costs[name] for name in fixed if quality[name] >= quality[one.method]]
        assert one.rival_seconds == pytest.approx(min(enough, default=math.inf))
        assert one.per_second == pytest.approx(1 / costs[one.method]) and one.low <= one.high


def test_rounds_widen_the_interval_of_a_speed(rng):
    rows = [*rows_of("ddim-5", rng.random(200) < 0.9), *rows_of("agent", rng.random(200) < 0.3)]
    even = equal_quality_speeds(rows, timed({"ddim-5": [2.0] * 5, "agent": [1.0] * 5}), QUICK)[1]
    uneven = equal_quality_speeds(rows, timed({"ddim-5": [2.0] * 5, "agent": [0.8, 0.9, 1.0, 1.1, 1.2]}), QUICK)[1]
    assert even.low == even.high == 2.0 and uneven.low < 2.0 < uneven.high
    together = [0.8, 0.9, 1.0, 1.1, 1.2]  # the machine was slower in some rounds: nobody is faster for it
    same = equal_quality_speeds(rows, timed({"ddim-5": [2 * s for s in together], "agent": together}), QUICK)[1]
    assert same.low == pytest.approx(2.0) and same.high == pytest.approx(2.0)
