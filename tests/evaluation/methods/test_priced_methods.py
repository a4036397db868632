"""An agent at prices: by which names, and that everything is played at the price that is named."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import thrifty_agent

from addiff_env.agent import Agent, PolicyNet
from addiff_env.evaluation import acceptance
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods import rollouts
from addiff_env.evaluation.methods.policy_method import PolicyMethod
from addiff_env.evaluation.methods.registry import make_method
from addiff_env.evaluation.methods.rule_policies import StopAt
from addiff_env.evaluation.methods.tuning import tuning_fingerprint
from addiff_env.evaluation.run.planning import all_methods
from addiff_env.evaluation.statistics.families import agent_fronts, agent_runs, at_price, control_names
from addiff_env.pipeline import make_agent_env

ITEMS = [Item("a red circle", 3, "colors"), Item("two blue squares", 1, "counting"), Item("a pink cross", 4, "colors")]


@pytest.fixture(scope="module")
def agent(small_kwargs: dict[str, Any]) -> Agent:
    return thrifty_agent({**small_kwargs, "prompts": [item.prompt for item in ITEMS]})


@pytest.fixture(scope="module")
def env(agent: Agent) -> Any:
    return make_agent_env(agent, 2)


# ------------------------------------------------------------------ names


@given(st.floats(1e-9, 1e3), st.sampled_from(["agent", "agent-s3"]))
def test_a_name_says_the_price_exactly(price: float, run: str) -> None:
    name = at_price(run, price)
    assert float(name.partition("@")[2]) == price and agent_runs([name]) == [name] and "," not in name
    assert agent_fronts([name]) == {run: [name]}
    assert not agent_runs(control_names(name))


def test_verdicts_are_about_the_price_that_is_named_first() -> None:
    names = ["ddim-5", "agent-s0@0.004", "agent-s1@0.004", "agent-s0@0.002", "agent-s1@0.002", "oracle-stop:ddim-5@x"]
    assert agent_runs(names) == names[1:3]
    assert agent_fronts(names) == {"agent-s0": [names[1], names[3]], "agent-s1": [names[2], names[4]]}
    assert agent_runs(["agent", "ddim-5"]) == ["agent"]


@pytest.mark.parametrize(
    ("spec", "name", "nfe"),
    [("agent@.001", "agent@0.001", 6), ("agent@16e-3", "agent@0.016", 2), ("agent", "agent@0.004", None)],
)
def test_methods_name_prices(agent: Agent, env: Any, spec: str, name: str, nfe: int | None) -> None:
    method = make_method(spec, env, agent)
    assert isinstance(method, PolicyMethod) and method.name == name and method.price == float(name[6:])
    made = [result for group in method.make(ITEMS) for _, result in group]
    assert {result.price for result in made} == {method.price}
    assert nfe is None or {result.nfe for result in made} == {nfe}
    assert make_method(spec, env, agent, run="agent-s2").name == name.replace("agent", "agent-s2")


@pytest.mark.parametrize("price", ["", "x", "nan", "0", "-0.004", "0.1", "1@2"])
def test_no_prices_are_quoted(agent: Agent, env: Any, price: str) -> None:
    with pytest.raises(ValueError, match=f"'agent@{price}'"):
        make_method(f"agent@{price}", env, agent)


def test_an_agent_without_a_price_input_has_no_price(env: Any) -> None:
    plain = Agent(PolicyNet({"quality": 8}, 4), {"env": {"id": "AdDiffusion-Tiny-v0"}})
    with pytest.raises(ValueError, match=r"'agent@.004'.*no price input"):
        make_method("agent@.004", env, plain)


def test_all_methods_show_the_agents_front(agent: Agent, env: Any) -> None:
    from addiff_env.evaluation.methods.diffusers_methods import MethodOptions

    names = [name for name in all_methods(env, MethodOptions(), False) if name.startswith("agent")]
    assert names == ["agent@0.004", "agent@0.001", "agent@0.002", "agent@0.008", "agent@0.016"]


# ------------------------------------------------------------------ rules at a price


def test_returns_are_those_of_the_price(agent: Agent, env: Any) -> None:
    """The difference of two prices, times what was evaluated after the warm-up."""
    for policy in (StopAt(4, 6), agent):
        cheap, dear = (rollouts.run_policy(env, policy, ITEMS, "rule", price) for price in (0.001, 0.002))
        assert cheap.nfe.tolist() == dear.nfe.tolist()
        np.testing.assert_allclose(cheap.values - dear.values, 0.001 * (cheap.nfe - 2), atol=1e-9)
    found = {run.name: run for run in rollouts.constants(env, ITEMS, 0.016)}
    for steps in (2, 4):
        plain = rollouts.run_policy(env, StopAt(steps, 6), ITEMS, "stop", 0.016)
        np.testing.assert_allclose(found[f"stop-{steps}"].values, plain.values, atol=1e-4)


def test_acceptance_is_decided_at_one_price(agent: Agent, capsys: Any, monkeypatch: Any) -> None:
    chosen: list[Any] = []

    def choose(env: Any, items: Any, price: float) -> rollouts.RuleChoice:
        chosen.append(price)
        return rollouts.RuleChoice(3, 0.0, 0.0, len(items), 1)

    monkeypatch.setattr(acceptance, "choose_rule", choose)
    bar = acceptance.AcceptanceTest(ITEMS, 1, 2, 0, price=0.001)
    report = bar.measure("here", agent)
    assert report.price == 0.001 and report.policy_runs[0].nfe.tolist() == [6, 6, 6] and "price 0.001" in report.text()
    continued = next(run for run in report.policy_runs if run.name == "always-continue")
    np.testing.assert_allclose(report.policy_runs[0].values, continued.values, atol=1e-4)
    assert acceptance.AcceptanceTest(ITEMS, 1, 2, 0).measure("here", agent).price == 0.004
    assert chosen == [0.001, 0.004]  # rules are tuned to the price
    with pytest.raises(ValueError, match="price must lie"):
        acceptance.AcceptanceTest(ITEMS, 1, 2, 0, price=1.0).measure("here", agent)


def test_a_tuning_is_of_one_price(agent: Agent, env: Any) -> None:
    fingerprints = [tuning_fingerprint(agent, env, ITEMS, "success", price)["price"] for price in (None, 0.001)]
    assert fingerprints == [0.004, 0.001]
