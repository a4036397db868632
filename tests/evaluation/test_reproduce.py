"""What the pages are made anew from: agents, rules and other methods that exist, in an order that verdicts rely on."""

from dataclasses import replace
from pathlib import Path

import pytest

from addiff_env.evaluation import reproduce
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.registry import fitting, is_agent
from addiff_env.evaluation.prices import read_rules
from addiff_env.evaluation.run.planning import named_agents
from addiff_env.evaluation.run.rows import write_rows
from addiff_env.evaluation.run.run_folder import write_items
from addiff_env.loading.paths import resolve_model
from addiff_env.types import ResultRow


@pytest.mark.parametrize("name", [reproduce.BUDGETS, reproduce.EVERYTHING])
def test_every_method_has_a_name_that_can_be_made(name: str) -> None:
    rules = read_rules(Path(resolve_model(reproduce.RULES)))
    names = reproduce.methods_of(name, rules)
    assert len(set(names)) == len(names) and all(fitting(one) for one in names)
    assert [one for one in names if is_agent(one)][0] == "agent@0.004"  # which verdicts are about
    assert {rule for named in rules.values() for rule in named.values()} <= set(names)


def test_the_readmes_rule_is_the_best_at_the_middle_price() -> None:
    rules = read_rules(Path(resolve_model(reproduce.RULES)))
    assert rules[0.004]["two-step"] in reproduce.REMARKS


def test_three_seeds_are_one_group_of_one_environment() -> None:
    agents = named_agents("", reproduce.SEEDS)
    assert list(agents) == ["agent-s0", "agent-s1", "agent-s2"]
    assert len({str(agent.environment) for agent in agents.values()}) == 1


def test_pictures_too_few_for_bars_leave_the_pages_other_parts(tmp_path: Path) -> None:
    item = Item("a red circle", 1, "colors", "0", 1)
    row = ResultRow("agent@0.004", item.prompt, 1, "colors", "model", "ddim-10", "agent", "float32", "1")
    write_rows(tmp_path / "rows.jsonl", [replace(row, scores={"success": 1.0})])
    write_items(tmp_path, [item])
    assert reproduce.bars_text(tmp_path).startswith("n/a: ")
