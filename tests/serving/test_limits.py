"""What a visitor may ask for, and what is refused in words."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_agents import small_agent

from addiff_env.agent import Agent
from addiff_env.evaluation.methods.rule_policies import StopAt
from addiff_env.pipeline import AdaptivePipeline, make_agent_env
from addiff_env.serving.limits import MAX_SEED, Budget, Limits, PictureRequest, read_request

LIMITS = Limits(Budget("target_nfe", "", "", 4.3, 9.5, 0.1, 6.9), default_steps=10, most_steps=50)
WHOLE = Limits(Budget("max_nfe", "", "", 4, 12, 1, 12), default_steps=10, most_steps=50)
GOOD: dict[str, Any] = {"prompt": "a star", "seed": 3, "budget": 7, "compare": True, "steps": 10}
ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())


def test_a_request_within_the_limits() -> None:
    assert read_request(LIMITS, **GOOD) == PictureRequest("a star", 3, 7, 10)
    edges = {"prompt": " " + "x" * 499, "seed": float(MAX_SEED), "budget": 9.5, "steps": 50.0}
    assert read_request(LIMITS, **GOOD | edges) == PictureRequest("x" * 499, MAX_SEED, 9.5, 50)
    assert read_request(LIMITS, **GOOD | {"compare": False, "steps": None}).steps is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"prompt": ""}, "prompt first"),
        ({"prompt": " \n"}, "prompt first"),
        ({"prompt": None}, "prompt first"),
        ({"prompt": ["a star"]}, "prompt first"),
        ({"prompt": "x" * 501}, "501 characters; at most 500"),
        ({"prompt": "a \0 star"}, "NUL"),
        ({"prompt": "a \ud800 star"}, "surrogate"),
        ({"seed": -1}, "seed must be a whole number from 0 to 9007199254740991, got -1"),
        ({"seed": 1.5}, "seed .* got 1.5"),
        ({"seed": None}, "seed .* got nothing"),
        ({"seed": True}, "seed"),
        ({"seed": "3"}, "seed"),
        ({"seed": 2**53}, "seed"),
        ({"seed": float("nan")}, "seed"),
        ({"budget": 4.2}, r"budget must be a number from 4.3 to 9.5, got 4.2"),
        ({"budget": 9.6}, "budget"),
        ({"budget": float("inf")}, "budget"),
        ({"budget": None}, "budget"),
        ({"steps": 0}, "fixed number of steps must be a whole number from 1 to 50, got 0"),
        ({"steps": 51}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"steps": None}, "steps"),
    ],
)
def test_what_lies_beyond_is_refused_by_name(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_request(LIMITS, **GOOD | wrong)


def test_a_budget_of_evaluations_is_whole() -> None:
    assert read_request(WHOLE, **GOOD).budget == 7
    with pytest.raises(ValueError, match="whole number from 4 to 12, got 7.5"):
        read_request(WHOLE, **GOOD | {"budget": 7.5})


@given(ANYTHING, ANYTHING, ANYTHING, ANYTHING, ANYTHING)
def test_whatever_a_browser_sends_is_a_request_or_refused(
    prompt: Any, seed: Any, budget: Any, compare: Any, steps: Any
) -> None:
    try:
        request = read_request(LIMITS, prompt, seed, budget, compare, steps)
    except ValueError:
        return
    assert request.prompt and 0 <= request.seed <= MAX_SEED and 4.3 <= request.budget <= 9.5
    assert request.steps is None or 1 <= request.steps <= 50


def test_the_slider_offers_what_the_agent_was_measured_for(agent: Agent, small_kwargs: dict[str, Any]) -> None:
    limits = Limits.of(AdaptivePipeline(make_agent_env(agent, 1), agent))
    budget = limits.budget
    assert (budget.name, budget.low, budget.high) == ("target_nfe", 4.3, 9.5)
    assert budget.low <= budget.start <= budget.high and limits.default_steps == 6
    for value in (budget.low, budget.start, budget.high):
        assert agent.price_for(**budget.arguments(value)) > 0
    untold = small_agent(small_kwargs, table=False)
    pipe = AdaptivePipeline(make_agent_env(untold, 1), untold)
    assert (Budget.of(pipe).name, Budget.of(pipe).low, Budget.of(pipe).high) == ("price", 0.001, 0.016)
    rule = AdaptivePipeline(make_agent_env(agent, 1, price_range=None), StopAt(4, 6))
    assert Budget.of(rule).arguments(Budget.of(rule).low) == {"max_nfe": 3} and Budget.of(rule).high == 12


def test_the_comparison_begins_with_the_environments_number_or_another(pipe: AdaptivePipeline) -> None:
    assert Limits.of(pipe, 25).default_steps == 25
    for wrong in (0, 51):
        with pytest.raises(ValueError, match="from 1 to 50"):
            Limits.of(pipe, wrong)
