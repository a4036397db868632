"""Rows on disk, intervals, the table, and the methods of the evaluation."""

from dataclasses import replace

import numpy as np
import pytest

from addiff_env.evaluation.benchmarks.items import load_benchmark
from addiff_env.evaluation.report.figures import plot_quality_against_compute, quality_figure
from addiff_env.evaluation.report.text import summary_table
from addiff_env.evaluation.run.rows import append_rows, merge_rows, read_rows
from addiff_env.evaluation.statistics.summary import action_shares, estimate, lead_with
from addiff_env.stats import effective_size, wilson_interval
from addiff_env.types import ResultRow


def row(method="ddim-5", seed=0, success=1.0, actions=(), nfe=5, category="colors"):
    return ResultRow(
        method,
        "a red circle",
        seed,
        category,
        "tiny@packaged",
        "ddim",
        "p",
        "float32",
        "0",
        actions=list(actions),
        nfe=nfe,
        forward_passes=2 * nfe,
        net_flops=nfe * 1e9,
        seconds=0.1,
        scores={"success": success},
    )


def test_rows_survive_the_disk(tmp_path):
    path = tmp_path / "run" / "rows.jsonl"
    append_rows(path, [row(seed=1), row(seed=2, actions=[0, 2, 1])])
    append_rows(path, [row(seed=3)])
    assert read_rows(path) == [row(seed=1), row(seed=2, actions=[0, 2, 1]), row(seed=3)]


def test_prices_are_kept_and_of_one_method_the_same(tmp_path):
    first, second = (replace(row("agent@0.004", seed), price=0.004) for seed in (1, 2))
    append_rows(tmp_path / "rows.jsonl", [first, row(seed=2)])
    assert read_rows(tmp_path / "rows.jsonl") == [first, row(seed=2)]
    assert '"price"' not in (tmp_path / "rows.jsonl").read_text().splitlines()[1]  # as files of earlier releases
    with pytest.raises(ValueError, match="'agent@0.004' was run with 2 values of price: 0.004.*0.002"):
        merge_rows([[first, replace(second, price=0.002)]], [("a red circle", 1), ("a red circle", 2)])


def test_torn_last_line_is_dropped_and_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [row(seed=1), row(seed=2)])
    whole = path.read_bytes()
    for cut in range(1, len(whole) // 2, 37):
        path.write_bytes(whole[:-cut])
        assert read_rows(path) == [row(seed=1)]
        append_rows(path, [row(seed=2)])
        assert path.read_bytes() == whole


def test_damaged_line_in_the_middle_is_refused_with_its_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [row(seed=1), row(seed=2)])
    path.write_text(path.read_text().replace('"nfe": 5', '"nfe" 5', 1))
    with pytest.raises(ValueError, match="rows.jsonl:1 is damaged"):
        read_rows(path)
    path.write_text('{"unheard_of": 1}\n')
    with pytest.raises(ValueError, match="unheard_of"):
        read_rows(path)


def test_wilson_interval_against_published_values():
    # Newcombe 1998, table I, method 3: 81/263 and 15/148 and 0/20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    with pytest.raises(ValueError, match="3 in 2"):
        wilson_interval(3, 2)


def test_pictures_of_one_prompt_are_not_independent():
    # Four pictures of 100 prompts that all say the same are 100 outcomes, and as many where nothing varies.
    prompts = [f"p{k // 4}" for k in range(400)]
    alike = np.repeat(np.arange(100) % 2, 4)
    found = estimate(alike, prompts, is_share=True)
    assert (found.low, found.high) == pytest.approx(wilson_interval(50, 100), abs=0.002)
    assert effective_size(np.ones(400), np.arange(400) // 4) == pytest.approx(100)
    # By hand: sums of 2 and 1 in 3 about 1.5, so .5^2 per cluster over 3 * .5 * .5 is an effect of 1/3, taken as 1.
    unlike = np.tile([1, 1, 0, 0, 0, 1], 200)
    assert effective_size(unlike, np.arange(1200) // 3) == pytest.approx(1200, rel=0.01)
    # Two pairs in three are alike: an effect of (2/3) / (2 * .5 * .5).
    pairs = np.tile([1, 1, 0, 0, 1, 0, 0, 1, 1, 1, 0, 0], 100)
    assert effective_size(pairs, np.arange(1200) // 2) == pytest.approx(1200 / (4 / 3), rel=0.01)
    # One picture a prompt: Wilson's own.
    found = estimate([1, 0, 1, 1], list("abcd"), is_share=True)
    assert (found.low, found.high) == wilson_interval(3, 4)


@pytest.mark.parametrize(("prompts", "rate"), [(40, 0.6), (40, 0.9), (300, 0.8)])
def test_intervals_of_clustered_shares_cover(rng, prompts, rate):
    # Prompts differ in difficulty (beta of mean ``rate``), and each has four pictures.
    owner, names = np.arange(4 * prompts) // 4, [str(k // 4) for k in range(4 * prompts)]
    covered, ignorant = [], []
    for _ in range(600):
        outcome = (rng.random(owner.size) < rng.beta(rate, 1 - rate, prompts)[owner]).astype(float)
        found = estimate(outcome, names, is_share=True)
        covered.append(found.low <= rate <= found.high)
        low, high = wilson_interval(outcome.sum(), outcome.size)
        ignorant.append(low <= rate <= high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.025)
    assert np.mean(ignorant) < 0.85


def test_table_says_what_the_rows_say():
    rows = [row(seed=k, success=k % 2) for k in range(4)]
    rows += [row("agent", k, 1.0, [0, 0, 2, 1], nfe=10 + k, category="counting") for k in range(4)]
    lines = summary_table(rows).splitlines()
    fixed, agent = lines[2].split(), lines[3].split()
    assert fixed[:3] == ["ddim-5", "4", "50.0"] and fixed[8] == "-"
    assert agent[:3] == ["agent", "4", "100.0"]
    assert agent[4:6] == ["11.5", "1.1"]  # mean and standard deviation of 10, 11, 12, 13
    assert agent[8] == "50/25/25"
    assert fixed[9:] == ["50", "-"] and agent[9:] == ["-", "100"]


def test_action_shares():
    assert action_shares([row()]) is None
    assert action_shares([row(actions=[0, 0, 0, 1])]) == pytest.approx([0.75, 0.25, 0.0])


def test_table_of_another_metric_is_of_its_own_scores():
    rows = [row("ddim-5"), row("agent"), row("agent"), row("none")]
    for one, score in zip(rows, (0.25, 0.21, 0.23, None), strict=True):
        one.prompt = str(score)
        one.scores = {"clip_score": 0.5} if score is None else {"hpsv2.1": score}
    lines = summary_table(lead_with(rows, "hpsv2.1")).splitlines()
    assert lines[0].split()[2] == "hpsv2.1" and "success" not in lines[0]
    half = 1.96 * 0.01 * 2**0.5 / 2**0.5
    assert lines[3].split()[:4] == ["agent", "2", "0.220", f"{0.22 - half:.3f}-{0.22 + half:.3f}"]
    assert lines[4].split()[:4] == ["none", "1", "n/a", "-"]  # who has no such score is said to have none
    assert len(lines) == 6 and "hpsv2.1 of none" in lines[5]


def test_plot_is_written(tmp_path):
    path = tmp_path / "plot.png"
    plot_quality_against_compute([row(), row("agent", nfe=7)], path)
    assert path.stat().st_size > 5000


def test_an_agent_at_several_prices_is_a_front_of_its_own():
    names = ["ddim-5", "ddim-10", "agent@0.002", "agent@0.004", "stop-3"]
    rows = [row(name, seed, nfe=5 + k) for k, name in enumerate(names) for seed in range(3)]
    (axis,) = quality_figure(rows, ["nfe"]).axes
    found = zip(*axis.get_legend_handles_labels(), strict=True)
    lines = {label: len((line if hasattr(line, "get_xdata") else line[0]).get_xdata()) for line, label in found}
    assert lines["agent"] == 2 and lines["stop-3"] == 1
    assert {"@0.002", "@0.004"} <= {text.get_text() for text in axis.texts}


def test_training_seeds_are_one_point_for_each_price():
    names = {"ddim-5": 5, "agent-s0@0.002": 6, "agent-s1@0.002": 8, "agent-s0@0.004": 3, "agent-s1@0.004": 4}
    rows = [row(name, seed, nfe=nfe) for name, nfe in names.items() for seed in range(3)]
    (axis,) = quality_figure(rows, ["nfe"]).axes
    found = zip(*axis.get_legend_handles_labels(), strict=True)
    lines = {label: (line if hasattr(line, "get_xdata") else line[0]) for line, label in found}
    assert list(lines["agent, 2 training seeds"].get_xdata()) == [3.5, 7]
    assert not any(label.startswith("agent-s") for label in lines)


def test_benchmark_limit_is_balanced_and_fixed():
    items = load_benchmark("tiny-test", 16)
    assert [item.category for item in items[:8]] == [item.category for item in items[8:]]
    assert len({(item.prompt, item.seed) for item in items}) == 16
    with pytest.raises(ValueError, match="coco"):
        load_benchmark("coco")
    with pytest.raises(ValueError, match="0"):
        load_benchmark("tiny-dev", 0)
