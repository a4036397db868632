"""The table of an agent's prices: what is interpolated, what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from addiff_env.agent import Agent, PolicyNet
from addiff_env.agent.price_table import PricePoint, PriceTable

PARTS = {"clip_image": 2, "price": 1, "quality": 8}
RANGE = (0.001, 0.016)


def table(costs: dict[float, float]) -> PriceTable:
    return PriceTable(tuple(PricePoint(p, nfe, 1e9 * nfe, 0.2, 0.7) for p, nfe in costs.items()), {"pictures": 8})


def agent(costs: dict[float, float] | None = None, parts: Any = PARTS, price_range: Any = RANGE) -> Agent:
    env = {"id": "AdDiffusion-Tiny-v0", "kwargs": {"price_range": price_range}}
    kept = {} if costs is None else {"prices": table(costs).kept()}
    return Agent(PolicyNet(parts, 4), {"env": env, "observation": parts, "hidden": 4} | kept)


costs = st.dictionaries(st.floats(1e-5, 1), st.floats(1, 50), min_size=1, max_size=8)


@given(costs, st.floats(0, 1))
def test_costlier_targets_never_have_higher_prices(measured: dict[float, float], share: float) -> None:
    """However noisy the measurements are."""
    found = table(measured)
    low, high = sorted((min(measured.values()), max(measured.values())))
    asked = sorted((low + share * (high - low), high))
    try:
        prices = [found.price_for("target_nfe", "nfe", target) for target in asked]
    except ValueError as error:  # the extremes of a noisy table are averaged away
        assert "[" in str(error)
        return
    assert prices[0] >= prices[1]
    assert all(min(measured) * 0.999 <= price <= max(measured) * 1.001 for price in prices)


@given(st.lists(st.floats(1e-5, 1), min_size=2, max_size=8, unique=True), st.floats(0.1, 5))
def test_the_measured_points_are_met(prices: list[float], step: float) -> None:
    """Costs that fall as they should: the target that was measured at a price gives that price."""
    found = table({price: 20 + step * len(prices) - step * k for k, price in enumerate(sorted(prices))})
    for point in found.points:
        assert found.price_for("target_nfe", "nfe", point.nfe) == pytest.approx(point.price, rel=1e-5)


def test_between_points_the_logarithm_is_linear() -> None:
    found = agent({0.001: 12, 0.004: 8, 0.016: 6})
    assert found.price_for(target_nfe=10) == pytest.approx(0.002)
    assert found.price_for(target_nfe=7) == pytest.approx(0.008)
    assert found.price_for(target_flops=10e9) == pytest.approx(0.002)


def test_noise_is_averaged_away() -> None:
    """Two neighbours in the wrong order count as their mean at both prices."""
    found = agent({0.001: 12, 0.002: 7, 0.008: 9, 0.016: 6})
    assert found.price_for(target_nfe=8) == pytest.approx(0.004)
    assert found.price_for(target_nfe=12) == pytest.approx(0.001)


@pytest.mark.parametrize("target", [5.9, 12.2, 0, -3, float("nan"), float("inf"), "9", True])
def test_targets_beyond_what_was_measured_name_the_range(target: Any) -> None:
    with pytest.raises(ValueError, match="target_nfe must") as error:
        agent({0.001: 12, 0.016: 6}).price_for(target_nfe=target)
    assert repr(target) in str(error.value)
    if target in (5.9, 12.2):
        assert "[6, 12]" in str(error.value) and "0.001" in str(error.value) and "0.016" in str(error.value)


def test_one_target_is_named() -> None:
    for targets in ({}, {"target_nfe": 8, "target_flops": 8e9}):
        with pytest.raises(ValueError, match="target_nfe or target_flops"):
            agent({0.001: 12, 0.016: 6}).price_for(**targets)


def test_agents_without_a_price_input_or_a_table_say_so() -> None:
    with pytest.raises(ValueError, match=r"no price input.*price_range"):
        agent(parts={"quality": 8}, price_range=None).price_for(target_nfe=8)
    with pytest.raises(ValueError, match="addiff agent table"):
        agent().price_for(target_nfe=8)
    assert agent().price_range == RANGE and agent(parts={"quality": 8}, price_range=None).price_range is None


def test_tables_travel_with_the_bundle(tmp_path: Any) -> None:
    with torch.random.fork_rng():
        saved = agent({0.016: 6, 0.001: np.float32(12)})
    saved.save(tmp_path)
    loaded = Agent.load(tmp_path)
    assert loaded.price_table == saved.price_table
    assert loaded.price_table is not None and [point.price for point in loaded.price_table.points] == [0.001, 0.016]
    assert "0.016" in loaded.model_card()


@pytest.mark.parametrize(
    "kept",
    [
        [],
        {"points": []},
        {"points": [], "measured_on": {}},
        {"points": [{"price": 0.1}], "measured_on": {}},
        {"points": [{"price": "x", "nfe": 1, "net_flops": 1, "reward": 1, "quality": 1}], "measured_on": {}},
        {"points": [{"price": 0.1, "nfe": 1, "net_flops": 1, "reward": 1, "quality": 1}] * 2, "measured_on": {}},
    ],
    ids=str,
)
def test_damaged_tables_are_refused(kept: Any) -> None:
    with pytest.raises(ValueError, match="table of prices is damaged"):
        PriceTable.read(kept)
