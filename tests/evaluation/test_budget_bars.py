"""One agent for every budget, held against what is asked: each number by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from addiff_env.evaluation import budget_bars
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.prices import keep_rules, read_rules
from addiff_env.evaluation.run.rows import write_rows
from addiff_env.evaluation.run.run_folder import write_items
from addiff_env.types import ResultRow

PROMPTS = 200
METHODS = {  # share of success, NFE, GFLOPs
    "ddim-5": (0.5, 5, 10.0),
    "ddim-50": (0.8, 50, 100.0),
    "best-of-2:ddim-5": (0.6, 10, 21.0),
    "threshold:5:0.1": (0.8, 10, 25.0),
    "two-step:0:5:0.5:2": (0.7, 8, 20.0),
    "agent-s0@0.002": (0.9, 10, 22.0),
    "agent-s1@0.002": (0.9, 10, 22.0),
    "agent-s0@0.004": (0.85, 9, 20.0),
    "agent-s1@0.004": (0.85, 9, 20.0),
    "agent-s0@0.008": (0.75, 8, 16.0),
    "agent-s1@0.008": (0.75, 8, 16.0),
}
RULES = {price: {"threshold": "threshold:5:0.1", "two-step": "two-step:0:5:0.5:2"} for price in (0.002, 0.004, 0.008)}


def rows() -> list[ResultRow]:
    """A method satisfies the first of the prompts; the later a prompt, the more evaluations of an agent."""
    found = []
    for method, (success, nfe, gigaflops) in METHODS.items():
        for index in range(PROMPTS):
            extra = (index >= PROMPTS / 2) - 0.5 if method.startswith("agent") else 0
            scores = {"success": float(index < success * PROMPTS)}
            place = (f"prompt {index}", index, "colors", "model", "ddim-10", method, "float32", "1")
            row = ResultRow(method, *place, nfe=int(nfe + 2 * extra), net_flops=gigaflops * 1e9, scores=scores)
            found.append(row)
    return found


def requirements(row: ResultRow) -> float:
    return float(row.seed >= PROMPTS / 2)


@pytest.fixture(scope="module")
def budgets() -> budget_bars.Budgets:
    return budget_bars.read_budgets(rows())


def test_means_are_of_all_training_seeds(budgets: budget_bars.Budgets) -> None:
    assert (
        budgets.agents == {0.002: "agent@0.002", 0.004: "agent@0.004", 0.008: "agent@0.008"} and budgets.middle == 0.004
    )
    np.testing.assert_allclose(budgets.found.means["agent@0.004"], [0.85, 20e9, 9])
    assert budgets.return_of("agent@0.004", 0.004) == pytest.approx(0.85 - 0.036)


def test_returns_and_savings_by_hand(budgets: budget_bars.Budgets) -> None:
    assert budgets.ahead(0.004, "threshold:5:0.1").estimate == pytest.approx(0.05 + 0.004)
    # a success of .8 half-way between two prices, at 18 GFLOPs, which the rule pays 25 for
    assert budgets.saved("threshold:5:0.1").estimate == pytest.approx(1 - 18 / 25)
    # at 20 GFLOPs best-of-N and the solver mix .5 at 10 with .6 at 21
    assert budgets.above_fixed(0.004).estimate == pytest.approx(0.85 - (0.5 + 0.1 * 10 / 11))
    assert budgets.ratio(0.008, "ddim-50").estimate == pytest.approx(0.16)


def test_the_bars_name_what_is_missed(budgets: budget_bars.Budgets) -> None:
    adaptivity = budget_bars.adaptivity_of(rows(), {(r.prompt, r.seed): requirements(r) for r in rows()}, 0.004)
    assert adaptivity.estimate == pytest.approx(1)
    found = {bar.name: bar for bar in budget_bars.bars(budgets, RULES, adaptivity)}
    assert len(found) == 3 + 3 + 2 + 3 + 2
    assert budget_bars.best_rule(budgets, RULES, 0.008) == "threshold:5:0.1"
    # at the highest price the rule satisfies .05 more for two evaluations
    (lost,) = [bar for name, bar in found.items() if name.startswith("return at 0.008")]
    assert lost.measured == pytest.approx(0.75 - 0.8 + 0.016) and lost.passed is False
    assert found["H1 at 0.004: NFE"].passed and found["H1 at 0.004: NFE"].measured == 9
    assert found["H1 at 0.004: net FLOPs of ddim-50's"].measured == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({0.004: RULES[0.004]}, "no rules for the price 0.002"),
        ({p: {"a": "stop-3"} for p in RULES}, "not in the run: stop-3"),
    ],
)
def test_rules_of_other_prices_or_runs_are_refused(
    rules: budget_bars.Chosen, words: str, budgets: budget_bars.Budgets
) -> None:
    with pytest.raises(ValueError, match=words):
        budget_bars.bars(budgets, rules, budgets.ratio(0.004, "ddim-50"))


def test_pictures_weigh_the_prompts_that_they_are_of(budgets: budget_bars.Budgets) -> None:
    # One method's rows lie in another order, and prompts have one picture or two: no order may decide what counts.
    twice = [replace(row, seed=row.seed + 1000) for row in rows() if row.seed < 20]
    both = sorted([*rows(), *twice], key=lambda row: row.seed % 1000)
    order = {name: -1 if name == "agent-s0@0.002" else 1 for name in METHODS}
    mixed = [row for name in METHODS for row in _of(name, both)[:: order[name]]]
    found = budget_bars.read_budgets(mixed).found.means
    np.testing.assert_allclose(found["agent@0.008"][0], (0.75 * PROMPTS + 20) / (PROMPTS + 20))


def _of(method: str, found: list[ResultRow]) -> list[ResultRow]:
    return [row for row in found if row.method == method]


def test_prices_that_differ_in_the_seventh_digit_are_two(tmp_path: Path) -> None:
    close = {"0.0020000001": "agent-s0@0.004", "0.002": "agent-s0@0.002", ".008": "agent-s0@0.008"}
    of = {old: f"agent-s0@{price}" for price, old in close.items()}
    renamed = [replace(row, method=of[row.method]) for row in rows() if row.method in of]
    seeds = [row for row in rows() if row.method in ("ddim-5", "agent-s1@0.008")]
    found = budget_bars.read_budgets([*renamed, *seeds])
    assert list(found.agents) == [0.002, 0.0020000001, 0.008] and len(set(found.agents.values())) == 3
    assert found.found.runs[found.agents[0.008]].shape[1] == 2  # both spellings of a price are one
    keep_rules(tmp_path / "rules.json", dict.fromkeys(found.agents, {"fixed": "stop-3"}))
    assert list(read_rules(tmp_path / "rules.json")) == list(found.agents)


@pytest.mark.parametrize("prompts", [2, 3, 24])
def test_few_prompts_leave_one_bar_unknown_and_show_the_others(tmp_path: Path, prompts: int) -> None:
    write_rows(tmp_path / "rows.jsonl", [row for row in rows() if row.seed < prompts])
    write_items(tmp_path, [Item(f"prompt {k}", k, "colors", str(k), k % 2) for k in range(prompts)])
    keep_rules(tmp_path / "rules.json", RULES)
    text, passed = budget_bars.describe_bars(tmp_path, tmp_path / "rules.json")
    assert not passed and "nan" in text and "return at 0.004" in text


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(1, 100)), min_size=1, max_size=5), st.floats(0, 1), st.integers(0, 99)
)
def test_no_mixture_is_cheaper(points: list[tuple[float, float]], success: float, seed: int) -> None:
    array = np.array([[[good, cost, 0.0] for good, cost in points]])
    least = budget_bars.cheapest_at(array, np.array([success]))[0]
    best = max(good for good, _ in points)
    assert np.isinf(least) == (success > best)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        share = rng.dirichlet(np.full(len(points), 0.3))
        good, cost = share @ np.array(points)
        assert good < success - 1e-9 or cost >= least - 1e-6 or len(points) == 1


def test_the_command_reads_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "rows.jsonl", rows())
    items = [Item(f"prompt {k}", k, "colors", str(k), int(k >= PROMPTS / 2)) for k in range(PROMPTS)]
    write_items(tmp_path, items)
    keep_rules(tmp_path / "rules.json", RULES)
    assert json.loads((tmp_path / "rules.json").read_text())["rules"]["0.004"] == RULES[0.004]
    assert budget_bars.main([str(tmp_path), "--rules", str(tmp_path / "rules.json")]) == 1
    out = capsys.readouterr().out
    assert "agent@0.004" in out and "FAIL" in out and "prices at which" in out
