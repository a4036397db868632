"""Significance: every statistic by hand, against scipy, or by its calibration over simulated rows."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from addiff_env.evaluation.statistics.bootstrap import Interval, critical_value, interval, resample, resampled_means
from addiff_env.evaluation.statistics.comparisons import cohens_dz, compare_methods, holm, wilcoxon_p
from addiff_env.evaluation.statistics.correlation import partial_spearman, spearman_test
from addiff_env.evaluation.statistics.front import MinDifference, above_front, front_quality
from addiff_env.evaluation.statistics.pairing import costs_of, paired_values, picture_counts, score_of
from addiff_env.evaluation.statistics.power import minimum_detectable_effect, required_prompts, required_runs
from addiff_env.types import ResultRow

SIMULATIONS = 1500


def row(method, prompt, seed, success, nfe=10, clip_score=None):
    scores = {"success": float(success), "clip_score": success / 2 if clip_score is None else clip_score}
    return ResultRow(
        method, prompt, seed, "c", "b", "s", method, "float32", "1", nfe=nfe, net_flops=nfe * 1e9, scores=scores
    )


def rows_of(**values):
    """Rows of methods, one prompt per value, one seed each."""
    return [row(m.replace("_", "-"), f"p{k}", k, v) for m, column in values.items() for k, v in enumerate(column)]


def paired_difference(a, b, draws=10_000):
    """Mean of ``a - b`` (prompts,) or (runs, prompts) with its interval."""
    groups = {"a": np.atleast_2d(a)[None], "b": np.atleast_2d(b)[None]}
    return resample(groups, draws=draws).difference("a", "b")


# --------------------------------------------------------------------------- pairing


def test_rows_are_paired_by_prompt_and_seed_and_averaged_over_seeds():
    rows = [row("a", "x", 1, 0), row("a", "x", 2, 1), row("a", "y", 3, 1), row("b", "y", 3, 0, nfe=7)]
    rows += [row("b", "x", 2, 1), row("b", "x", 1, 1)]
    values = paired_values(rows, ["a", "b"], [score_of("success"), costs_of("nfe")])
    assert values["a"].tolist() == [[[0.5, 1.0]], [[10.0, 10.0]]]
    assert values["b"].tolist() == [[[1.0, 0.0]], [[10.0, 7.0]]]
    runs = paired_values(rows, {"both": ["a", "b"]}, [score_of("success")])
    assert runs["both"].tolist() == [[[0.5, 1.0], [1.0, 0.0]]]


def test_what_is_not_paired_is_refused():
    rows = rows_of(a=[1, 0, 1], b=[1, 0, 1])
    with pytest.raises(ValueError, match=r"'b' lacks 1 of 3 pictures.*'p2', 2"):
        paired_values(rows[:-1], ["a", "b"], [score_of("success")])
    with pytest.raises(ValueError, match=r"no rows of \['c'\]; rows are of \['a', 'b'\]"):
        paired_values(rows, ["a", "c"], [score_of("success")])
    with pytest.raises(ValueError, match="two rows of 'a' for 'p0', seed 0"):
        paired_values([*rows, rows[0]], ["a"], [score_of("success")])
    with pytest.raises(ValueError, match=r"no 'fid' in the row of \(a, 'p0', seed 0\); it has"):
        paired_values(rows, ["a"], [score_of("fid")])
    with pytest.raises(ValueError, match="unknown cost 'money'"):
        costs_of("money")


# --------------------------------------------------------------------------- bootstrap


def test_interval_agrees_with_scipy(rng):
    a, b = rng.normal(0.3, 1, 80), rng.normal(0, 1, 80)
    ours = paired_difference(a, b, draws=20_000)
    theirs = stats.bootstrap((a - b,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.015)
    assert ours.standard_error == pytest.approx(np.std(a - b) / math.sqrt(80), rel=0.03)
    assert ours.estimate == pytest.approx(np.mean(a - b))


def test_the_seed_fixes_everything_and_chunks_change_nothing(rng, monkeypatch):
    values = {"a": rng.random((2, 3, 50)), "b": rng.random((2, 1, 50))}
    whole = resampled_means(values, 200, seed=4)
    monkeypatch.setattr("addiff_env.evaluation.statistics.bootstrap.MAX_CELLS", 50 * 7)
    parts = resampled_means(values, 200, seed=4)
    for name in values:
        np.testing.assert_allclose(parts[name], whole[name])
    assert not np.allclose(whole["a"], resampled_means(values, 200, seed=5)["a"])


def test_copied_seeds_are_no_evidence(rng):
    # Ten pictures of a prompt that all say the same must not narrow the interval.
    success = rng.integers(0, 2, 60)
    once = [row("a", f"p{k}", k, v) for k, v in enumerate(success)]
    often = [row("a", f"p{k}", 100 * k + s, v) for k, v in enumerate(success) for s in range(10)]
    tables = [paired_values(rows, ["a"], [score_of("success")])["a"][0] for rows in (once, often)]
    np.testing.assert_array_equal(*tables)


def test_prompts_weigh_by_their_pictures(rng):
    # As tables do: nine pictures of one prompt and one of another average to a mean of ten pictures.
    rows = [row("a", "x", k, 1) for k in range(9)] + [row("a", "y", 9, 0)]
    counts = picture_counts(rows, {"a": ["a"]})
    assert counts.tolist() == [9, 1]
    found = resample(paired_values(rows, ["a"], [score_of("success"), costs_of("nfe")]), draws=500, pictures=counts)
    assert found.means["a"].tolist() == pytest.approx([0.9, 10])
    # Of two prompts both are x, both y, or one each; never are they weighed as if they had one picture each.
    assert set(np.round(found.draws["a"][:, 0], 6)) == {0.0, 0.9, 1.0} and np.allclose(found.draws["a"][:, 1], 10)


def test_intervals_of_unequal_prompts_cover(rng):
    # Prompts of 1 to 8 pictures, whose differences depend on their number: the interval is of the pictures' mean.
    sizes = rng.integers(1, 9, (400, 150))
    values = rng.normal(0.1 * sizes, 1)
    truth = (0.1 * np.arange(1, 9) ** 2).mean() / np.arange(1, 9).mean()
    found = [
        resample({"d": value[None, None]}, draws=400, seed=k, pictures=size).mean("d")
        for k, (value, size) in enumerate(zip(values, sizes, strict=True))
    ]
    covered = np.mean([one.low <= truth <= one.high for one in found])
    assert 0.92 <= covered <= 0.98  # 400 trials of 95%: standard error .011
    assert np.mean([one.estimate for one in found]) == pytest.approx(truth, abs=0.02)


def test_training_runs_are_a_level_of_their_own(rng):
    # Runs that differ by a constant: the variance of the mean is that of prompts plus (R-1)/R * var / R of runs.
    prompts, effects = rng.normal(0, 1, 200), rng.normal(0, 0.5, 8)
    agent = prompts + effects[:, None]
    found = paired_difference(agent, np.zeros(200), draws=8000)
    expected = math.sqrt(prompts.var() / 200 + effects.var() / 8)
    assert found.standard_error == pytest.approx(expected, rel=0.05)
    pooled = paired_difference(agent.mean(0), np.zeros(200), draws=8000)
    assert found.standard_error > 2 * pooled.standard_error


def simulated(rng, effect=0.0, prompts=80):
    """Per-prompt differences of many simulated evaluations with skewed scores."""
    a, b = rng.gamma(2, 0.25, (2, SIMULATIONS, prompts))
    return a - b + effect


def replicates_of(differences, draws=1500):
    """Observed means (S,) and bootstrap means (draws, S): simulations travel as measures."""
    means = resampled_means({"d": differences[:, None, :]}, draws, seed=1)["d"]
    return differences.mean(1), means


def test_intervals_cover_and_p_values_are_uniform_under_the_null(rng):
    observed, draws = replicates_of(simulated(rng))
    found = [interval(estimate, column) for estimate, column in zip(observed, draws.T, strict=True)]
    coverage = np.mean([f.low <= 0 <= f.high for f in found])
    assert coverage == pytest.approx(0.95, abs=0.02)
    p = np.array([f.p_two_sided() for f in found])
    assert stats.kstest(p - rng.uniform(0, 2 / 1501, p.size), "uniform").pvalue > 0.01  # counts, spread out
    assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=0.02)
    one_sided = np.array([f.p_below(0.0) for f in found])
    assert stats.kstest(one_sided - rng.uniform(0, 1 / 1501, p.size), "uniform").pvalue > 0.01
    assert np.mean(one_sided <= 0.05) == pytest.approx(0.05, abs=0.02)


def test_p_and_bounds_never_disagree(rng):
    """A skewed statistic at any bound: p is at most alpha just where the bound of that level lies beyond."""
    for alpha, number in [(0.05, 199), (0.05, 200), (0.025, 1000), (0.01, 333), (0.1, 10)]:
        draws = rng.gamma(2, 0.5, number)
        for bound in np.r_[draws, draws + 1e-6, draws - 1e-6, -1.0, 9.0]:
            found = interval(draws.mean() - bound, draws - bound, 1 - 2 * alpha)
            above, below = found.low > found.rounding, found.high < -found.rounding
            assert above == (found.p_below(0.0) <= alpha), (alpha, number, bound)
            assert (above or below) == (found.p_two_sided() <= 2 * alpha), (alpha, number, bound)


def test_ties_count_as_extreme(rng):
    # Where nothing can be said for sure, p is 1: rounding must not split exact ties.
    a = np.r_[np.ones(10), np.zeros(10)]
    found = paired_difference(a, a[::-1], draws=500)
    assert found.estimate == 0 and found.p_two_sided() == 1.0
    assert paired_difference(0.1 * a, 0.1 * a, draws=50).p_two_sided() == 1.0


def test_a_planted_effect_is_recovered(rng):
    observed, draws = replicates_of(simulated(rng, effect=0.15))
    found = [interval(estimate, column) for estimate, column in zip(observed, draws.T, strict=True)]
    assert np.mean([f.low <= 0.15 <= f.high for f in found]) == pytest.approx(0.95, abs=0.02)
    power = stats.norm.cdf(0.15 / (0.5 / math.sqrt(80)) - 1.96)  # gamma(2) scaled by .25: each variance .125
    assert np.mean([f.p_two_sided() <= 0.05 for f in found]) == pytest.approx(power, abs=0.04)


def test_non_inferiority_at_its_margin(rng):
    margin = 0.05
    observed, draws = replicates_of(simulated(rng, effect=-margin))
    p = [interval(e, c).p_below(-margin) for e, c in zip(observed, draws.T, strict=True)]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.02)  # as bad as the margin: passes 5% of times


def test_degenerate_input_is_refused():
    with pytest.raises(ValueError, match="got 1 and 10000"):
        paired_difference(np.ones(1), np.ones(1))
    with pytest.raises(ValueError, match=r"different numbers of prompts: \[3, 4\]"):
        paired_difference(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="level"):
        interval(0.0, np.zeros(3), 1.0)
    with pytest.raises(ValueError, match="30 replicates are too few for an interval at level 0.95"):
        interval(0.0, np.zeros(30))


# --------------------------------------------------------------------------- tests and effect sizes


def test_wilcoxon_agrees_with_its_exact_distribution(rng):
    differences = rng.normal(0.3, 1, 40)
    exact = stats.wilcoxon(differences, method="exact").pvalue
    assert wilcoxon_p(differences) == pytest.approx(exact, rel=0.05)
    assert wilcoxon_p(np.zeros(9)) == 1.0
    assert wilcoxon_p(np.r_[np.zeros(50), -np.ones(20)]) < 0.001


def test_wilcoxon_is_calibrated(rng):
    successes = rng.binomial(4, 0.6, (2, 600, 80)) / 4  # ties and zeros, as means over four seeds have them
    p = np.array([wilcoxon_p(d) for d in successes[0] - successes[1]])
    assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=0.025)


def test_effect_sizes_by_hand(rng):
    sample = rng.normal(0.4, 2, 30)
    t = stats.ttest_1samp(sample, 0).statistic
    assert cohens_dz(sample) == pytest.approx(t / math.sqrt(30))
    assert cohens_dz(np.zeros(4)) == 0.0 and cohens_dz(-np.ones(4)) == -math.inf


def test_rounding_is_no_difference_and_breaks_no_tie():
    # Three runs that do as the baseline does: their mean is the same number, but for its last digit.
    values = np.random.default_rng(1).normal(0.3, 0.02, 60)
    rows = [row(name, f"p{k}", k, 1, clip_score=value) for name in "abcd" for k, value in enumerate(values)]
    (found,) = compare_methods(rows, {"runs": ["a", "b", "c"]}, ["d"], ["clip_score"], draws=400)
    assert (found.p_wilcoxon, found.cohens_dz) == (1.0, 0.0)
    # Every prompt differs by a tenth, which no two of these differences are in binary.
    rows = [row("b", f"p{k}", k, 1, clip_score=value) for k, value in enumerate(values)]
    rows += [row("a", f"p{k}", k, 1, clip_score=value + 0.1) for k, value in enumerate(values)]
    (found,) = compare_methods(rows, ["a"], ["b"], ["clip_score"], draws=400)
    assert found.cohens_dz == math.inf
    assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(np.ones(60), method="approx").pvalue)


def test_holm_by_hand():
    # Sorted .01, .02, .03, .04: times 4, 3, 2, 1, kept from falling.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []
    with pytest.raises(ValueError, match=r"1\.5"):
        holm([0.1, 1.5])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(p):
    adjusted, alpha, rejected = holm(p), 0.05, set()
    for step, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[index] * (len(p) - step) > alpha:
            break
        rejected.add(index)
    assert {k for k, value in enumerate(adjusted) if value <= alpha} == rejected


def test_holm_holds_the_family_wise_error(rng):
    p = rng.uniform(size=(3000, 10))
    p[:, 7:] = 1e-9  # three true effects must not use up the others' share
    errors = [min(holm(family)[:7]) <= 0.05 for family in p.tolist()]
    assert np.mean(errors) == pytest.approx(0.05, abs=0.012)


def test_the_minimum_detectable_effect_is_found_with_the_power_it_states(rng):
    effect = minimum_detectable_effect(0.8, 200)
    sample = rng.normal(effect, 0.8, (4000, 200))
    assert np.mean(stats.ttest_1samp(sample, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.03)


def test_the_required_number_decides_with_the_power_it_states(rng):
    number = required_prompts(gap=0.1, standard_error=0.8 / math.sqrt(50), prompts=50)
    p = stats.ttest_1samp(rng.normal(0.1, 0.8, (4000, number)), 0, axis=1, alternative="greater").pvalue
    assert np.mean(p < 0.05) == pytest.approx(0.8, abs=0.03)
    assert required_prompts(0.0, 1.0, 50) is None


def test_prompts_do_not_make_up_for_runs():
    # A standard error of .05, of which .03 is the runs': prompts shrink .04 alone, to what the gap leaves them.
    wanted = 0.1 / (1.6449 + 0.8416)
    number = required_prompts(0.1, 0.05, 100, run_error=0.03)
    assert number == math.ceil(100 * 0.04**2 / (wanted**2 - 0.03**2))
    assert math.hypot(0.04 * math.sqrt(100 / number), 0.03) == pytest.approx(wanted, rel=0.01)
    assert required_prompts(0.05, 0.05, 100, run_error=0.03) is None  # .02 is wanted: no number of prompts would do
    assert required_runs(0.05, 0.03, 3) == math.floor(3 * (0.03 / 0.0201) ** 2) + 1 == 7
    assert required_runs(0.0, 0.03, 3) is None


def test_comparisons_cover_every_metric_and_baseline_with_one_correction(rng):
    good, base = rng.random(120) < 0.8, rng.random(120) < 0.5
    rows = rows_of(agent=good, ddim_5=base, ddim_9=base)
    found = compare_methods(rows, ["agent"], ["ddim-5", "ddim-9"], ["success", "clip_score"], draws=2000)
    assert [(c.metric, c.baseline) for c in found] == [
        (metric, baseline) for metric in ("success", "clip_score") for baseline in ("ddim-5", "ddim-9")
    ]
    first = found[0]
    assert first.difference == pytest.approx(good.mean() - base.mean()) and first.prompts == 120
    assert first.low < first.difference < first.high
    assert [c.p_holm for c in found] == holm([c.p_bootstrap for c in found])
    assert first.p_bootstrap < first.p_holm < 0.01 and first.p_wilcoxon < 0.01
    assert found[2].difference == pytest.approx(first.difference / 2)
    assert found[2].cohens_dz == pytest.approx(first.cohens_dz)
    spread = np.std(good.astype(float) - base, ddof=1)
    corrected = minimum_detectable_effect(spread, 120, alpha=0.05 / 4)  # as p is: four comparisons
    assert first.minimum_detectable == pytest.approx(corrected) and corrected > minimum_detectable_effect(spread, 120)


def test_what_is_detectable_allows_for_training_runs():
    """Runs .1 apart tell nothing smaller, however many prompts there are."""
    prompts = np.arange(500)
    rows = [
        ResultRow(name, f"p{k}", 0, "c", "b", "s", name, "float32", "1", scores={"q": 0.01 * np.sin(k) + shift})
        for name, shift in (("s0", -0.1), ("s1", 0.0), ("s2", 0.1), ("other", -0.03))
        for k in prompts
    ]
    (found,) = compare_methods(rows, {"agent": ["s0", "s1", "s2"]}, ["other"], ["q"], draws=1000)
    error = np.std([-0.1, 0.0, 0.1]) / math.sqrt(3)
    assert found.minimum_detectable == pytest.approx((1.96 + 0.8416) * error, rel=1e-3)
    assert found.difference == pytest.approx(0.03) and found.p_bootstrap > 0.3


def test_many_comparisons_can_still_be_significant(rng):
    """Two in ten thousand, times 80 comparisons, would be .016 for any data."""
    many = {f"m{k}": np.zeros(40) for k in range(80)}
    found = compare_methods(rows_of(agent=np.ones(40), **many), ["agent"], list(many), ["success"], draws=500)
    assert len(found) == 80 and max(one.p_holm for one in found) <= 0.01


# --------------------------------------------------------------------------- rank correlation


def test_spearman_agrees_with_scipy(rng):
    x = rng.integers(0, 6, 150).astype(float)
    y = 0.3 * x + rng.normal(size=150)
    found = spearman_test(x, y)
    theirs = stats.spearmanr(x, y, alternative="greater")
    assert found.rho.estimate == pytest.approx(theirs.statistic)
    assert found.rho.low < theirs.statistic < found.rho.high
    fisher = 1.03 / math.sqrt(150 - 3) * (1 - theirs.statistic**2)  # approximate standard error
    assert found.rho.standard_error == pytest.approx(fisher, rel=0.2)
    y = rng.normal(size=150)
    assert spearman_test(x, y).p_permutation == pytest.approx(
        stats.spearmanr(x, y, alternative="greater").pvalue, abs=0.04
    )


def test_the_permutation_null_is_calibrated(rng):
    p = []
    for k in range(400):
        x, y = rng.integers(0, 4, 40), rng.exponential(size=40)
        p.append(spearman_test(x, y, draws=200, seed=k).p_permutation)
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.03)
    assert stats.kstest(np.array(p) - rng.uniform(0, 1 / 201, 400), "uniform").pvalue > 0.01


def test_no_correlation_of_what_does_not_vary():
    with pytest.raises(ValueError, match="x varies by 4.0, y by 0.0"):
        spearman_test(np.arange(5), np.ones(5))
    with pytest.raises(ValueError, match="four prompts"):
        spearman_test(np.arange(3), np.arange(3))


def test_partial_correlation_removes_what_the_seed_explains(rng):
    seed = rng.integers(0, 5, 2000)
    x, y = seed + rng.normal(0, 0.1, 2000), seed + rng.normal(0, 0.1, 2000)
    assert stats.spearmanr(x, y).statistic > 0.9
    assert abs(partial_spearman(x, y, seed)) < 0.1
    shared = rng.normal(size=2000)
    assert partial_spearman(x + shared, y + shared, seed) > 0.5
    # Independent of the above: residuals of a least-squares fit on seed dummies.
    dummies = np.eye(5)[seed]
    rests = [r - dummies @ np.linalg.lstsq(dummies, r, rcond=None)[0] for r in map(stats.rankdata, (x, y))]
    assert partial_spearman(x, y, seed) == pytest.approx(np.corrcoef(*rests)[0, 1])
    assert partial_spearman(x, y, np.arange(2000)) is None


# --------------------------------------------------------------------------- the front


def best_mixture(costs, qualities, at):
    """Quality of the best coin toss between methods whose mean cost is at most ``at``, by linear programming."""
    solved = optimize.linprog(-qualities, A_ub=[costs], b_ub=[at], A_eq=[np.ones(len(costs))], b_eq=[1.0])
    return -solved.fun if solved.success else None


@given(st.data())
def test_the_front_is_the_best_mixture(data):
    number = data.draw(st.integers(1, 6))
    grid = st.integers(0, 20)
    costs = np.array(data.draw(st.lists(grid, min_size=number, max_size=number)), float)
    qualities = np.array(data.draw(st.lists(grid, min_size=number, max_size=number)), float)
    at = float(data.draw(st.integers(0, 22)))
    front = front_quality(costs[None], qualities[None], np.array([at]))[0]
    if at < costs.min():
        assert front == qualities[costs.argmin()]
    else:
        assert front == pytest.approx(best_mixture(costs, qualities, at), abs=1e-6)


def test_the_front_by_hand():
    costs, qualities = np.array([[10.0, 20.0, 40.0]]), np.array([[0.5, 0.7, 0.6]])
    for at, expected in ((5, 0.5), (10, 0.5), (15, 0.6), (20, 0.7), (30, 0.7), (99, 0.7)):
        assert front_quality(costs, qualities, np.array([float(at)]))[0] == pytest.approx(expected)


def points(rng, prompts, agent, others):
    """Per-prompt (quality, cost) of an agent and fixed methods with given success rates and costs."""

    def draw(rate, cost):
        return np.stack([rng.random(prompts) < rate, np.full(prompts, float(cost))]).astype(float)[:, None]

    return draw(*agent), {f"m{k}": draw(*other) for k, other in enumerate(others)}


def distance_to_front(agent, front, level=0.95, draws=10_000, seed=0):
    """How far an agent's (quality, cost) (2, runs, prompts) lies above the front of fixed methods."""
    return above_front(resample({"agent": agent, **front}, level=level, draws=draws, seed=seed), "agent", list(front))


def test_distance_to_the_front_recovers_what_was_planted(rng):
    agent, front = points(rng, 3000, (0.75, 15), [(0.5, 10), (0.7, 20)])
    found = distance_to_front(agent, front, draws=2000)
    assert found.estimate == pytest.approx(0.15, abs=0.04) and found.low > 0.05
    assert found.low < 0.15 < found.high and found.nearest == "m0 with m1"
    with pytest.raises(ValueError, match="at least one fixed method"):
        distance_to_front(agent, {})


def test_the_nearest_comparison_is_the_distance_to_the_front(rng):
    # Every member that costs no more and every chord over the agent's cost: the least of them is the front's.
    for agent_cost in (4, 10, 17, 60):
        agent, front = points(rng, 50, (0.6, agent_cost), [(0.4, 5), (0.7, 10), (0.5, 20), (0.8, 40)])
        means = {name: array.mean((1, 2)) for name, array in front.items()}
        costs, qualities = np.array([means[name][::-1] for name in front]).T
        height = front_quality(costs[None], qualities[None], np.array([float(agent_cost)]))[0]
        found = distance_to_front(agent, front, draws=50)
        cheap = int((costs <= agent_cost).sum())
        assert found.estimate == pytest.approx(agent[0].mean() - height)
        assert len(found.differences) == max(1, cheap) + cheap * (4 - cheap)


def test_a_mixture_is_of_shares(rng):
    # The agent's mean cost is noisy and lies between two methods of nearly the same cost: no replicate extrapolates.
    agent, front = points(rng, 60, (0.6, 0), [(0.5, 14.99), (0.7, 15.01)])
    agent[1] = rng.permutation(np.r_[np.full(30, 5.0), np.full(30, 25.0)])
    found = distance_to_front(agent, front, draws=500).differences["m0 with m1"]
    members = [agent[0].mean() - array[0].mean() for array in front.values()]
    assert min(members) < found.estimate < max(members) and found.standard_error < 0.2


def test_simultaneous_bounds_by_hand(rng):
    draws = rng.normal(0, 0.5, (20_000, 10))
    tens = [interval(0.0, column) for column in draws.T]
    assert critical_value(tens[:1], 0.05) == pytest.approx(stats.norm.ppf(0.95), abs=0.03)
    assert critical_value(tens, 0.05) == pytest.approx(stats.norm.ppf(0.95 ** (1 / 10)), abs=0.03)  # independent
    assert critical_value([tens[0]] * 10, 0.05) == critical_value(tens[:1], 0.05)  # one and the same
    assert critical_value([interval(1.0, np.ones(50))], 0.05) == 0.0
    rounded = interval(28.0, 28.0 + 1e-15 * rng.normal(size=20_000))  # a constant cost, as sums of floats give it
    assert critical_value([*tens, rounded], 0.05) == critical_value(tens, 0.05)
    least = MinDifference({"a": tens[0], "b": Interval(-1.0, -1.5, -0.5, tens[1].draws - 1)}, 0.9)
    assert (least.nearest, least.estimate, least.low) == ("b", -1.0, -1.5)
    assert least.high == pytest.approx(-1 + 0.5 * stats.norm.ppf(math.sqrt(0.95)), abs=0.03)
    assert least.p_below(-2.0) == max(one.p_below(-2.0) for one in least.differences.values())


def outcomes(rng, kind, shape, gap=0.0):
    """Values of mean .8 + ``gap``, 0 or 1 or continuous and skewed."""
    if kind == "binary":
        return (rng.random(shape) < 0.8 + gap).astype(float)
    return 0.8 + gap + rng.gamma(2, 0.2, shape) - 0.4


@pytest.mark.parametrize(("kind", "runs"), [("binary", 1), ("continuous", 1), ("binary", 4), ("continuous", 4)])
def test_a_flat_front_takes_nothing_from_its_rival(rng, kind, runs):
    # Five methods are equally good: the best of five noisy means lies above the truth, and its replicates higher still.
    better, below, covered = [], [], []
    for k in range(250):
        truth, spread = 0.05 * (k % 2), 0.02 if runs > 1 else 0.0
        common = 0.1 * rng.normal(size=100) if kind == "continuous" else 0.0  # difficulty: pairs correlate
        costs = {f"m{cost}": np.full(100, float(cost)) for cost in (5, 10, 20, 30, 50)}
        front = {m: np.stack([outcomes(rng, kind, 100) + common, cost])[:, None] for m, cost in costs.items()}
        quality = outcomes(rng, kind, (runs, 100), truth) + common + spread * rng.normal(size=(runs, 1))
        agent = np.stack([quality, np.clip(rng.normal(15, 5, (runs, 100)), 1, None)])
        found = distance_to_front(agent, front, draws=300, seed=k, level=0.9)
        better.append(found.low > truth)
        below.append(found.high < truth)
        covered.append(found.low <= truth <= found.high)
    assert np.mean(better) <= 0.05 and np.mean(below) <= 0.075  # .05 and two standard errors
    assert np.mean(covered) >= 0.88


def test_a_good_agent_is_told_from_a_flat_front(rng):
    found = [
        distance_to_front(
            *points(rng, 300, (0.92, 15), [(0.8, cost) for cost in (5, 10, 20, 30, 50)]), draws=300, seed=k
        )
        for k in range(40)
    ]
    assert np.mean([one.low > 0 for one in found]) > 0.8
    assert np.mean([one.high < 0.12 for one in found]) < 0.1


def test_an_agent_on_the_front_is_called_better_in_one_case_of_twenty(rng):
    better = []
    for k in range(1000):
        agent, front = points(rng, 100, (0.6, 15), [(0.5, 10), (0.7, 20)])
        better.append(distance_to_front(agent, front, draws=300, seed=k, level=0.9).low > 0)
    assert np.mean(better) == pytest.approx(0.05, abs=0.02)
