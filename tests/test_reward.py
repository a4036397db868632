"""The reward, recomputed by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from addiff_env.reward import COMPONENTS, RewardConfig, quality, step_reward


def one_step(
    config: RewardConfig, phi: float, after: float, similarity: float, nfe: int, end: bool
) -> dict[str, float]:
    values = (np.array([value]) for value in (phi, after, similarity))
    parts = step_reward(config, *values, np.array([nfe]), np.array([end]))
    assert all(value.shape == (1,) and value.dtype == np.float64 for value in parts.values())
    return {name: float(value[0]) for name, value in parts.items()}


def episode(config: RewardConfig, phis: list[float], similarity: float = 1.0, nfe: int = 1) -> list[dict[str, float]]:
    """Rewards of a trajectory through these qualities; the last one is the final image's."""
    last = len(phis) - 2
    return [one_step(config, a, b, similarity, nfe, i == last) for i, (a, b) in enumerate(pairwise(phis))]


def test_components_by_hand() -> None:
    config = RewardConfig(shaping=2.0, gamma=0.9, instability=0.5, efficiency=0.01, terminal=3.0)
    going = one_step(config, 0.4, 0.6, 0.8, 2, end=False)
    assert going == pytest.approx(
        {
            "shaping": 2 * (0.9 * 0.6 - 0.4),
            "instability": -0.5 * 0.2,
            "efficiency": -0.02,
            "terminal": 0,
            "fault": 0,
            "total": 0.28 - 0.1 - 0.02,
        }
    )
    ending = one_step(config, 0.4, 0.6, 0.8, 0, end=True)
    assert ending == pytest.approx(
        {"shaping": -0.8, "instability": -0.1, "efficiency": 0, "terminal": 1.8, "total": 0.9}
    )


def test_lanes_are_separate() -> None:
    config = RewardConfig()
    phi, after, similarity = np.array([[0.1, 0.9], [0.5, 0.2], [1.0, 0.3]])
    nfe, end = np.array([1, 2]), np.array([False, True])
    parts = step_reward(config, phi, after, similarity, nfe, end)
    for lane in range(2):
        alone = one_step(config, phi[lane], after[lane], similarity[lane], nfe[lane], end[lane])
        assert {name: value[lane] for name, value in parts.items()} == alone
    assert set(parts) == {*COMPONENTS, "total"}


def test_quality_by_hand() -> None:
    config = RewardConfig(clip_weight=0.3, reward_weight=0.7, clip_mean=0.2, clip_std=0.1, reward_mean=1, reward_std=2)
    value = quality(np.array([0.4, 0.2]), np.array([0.0, 1.0]), config)
    by_hand = 0.3 / (1 + math.exp(-2)) + 0.7 / (1 + math.exp(0.5))
    np.testing.assert_allclose(value, [by_hand, 0.5], rtol=1e-12)
    assert np.isfinite(quality(np.array([-1.0]), np.array([-1e4]), config)).all()  # no overflow


qualities = st.lists(st.floats(0, 1), min_size=2, max_size=12)


@given(qualities, st.sampled_from([1.0, 0.99, 0.5]), st.floats(0, 5))
def test_shaping_telescopes(phis: list[float], gamma: float, weight: float) -> None:
    """Discounted shaping depends on the first state only, so it cannot change which policy is best."""
    parts = episode(RewardConfig(gamma=gamma, shaping=weight), phis)
    discounted = sum(gamma**i * part["shaping"] for i, part in enumerate(parts))
    assert discounted == pytest.approx(-weight * phis[0], abs=1e-9)


@given(qualities)
def test_return_is_final_quality_minus_cost(phis: list[float]) -> None:
    parts = episode(RewardConfig(instability=0, efficiency=0.01), phis)
    assert sum(part["total"] for part in parts) == pytest.approx(phis[-1] - phis[0] - 0.01 * len(parts), abs=1e-9)


@given(st.floats(0, 1), st.floats(0.5, 1))
@hypothesis_settings(max_examples=20)
def test_mere_continuing_never_pays(phi: float, similarity: float) -> None:
    """The published prototype's flaw: constant quality must return less with every further step."""
    config = RewardConfig()
    returns = [sum(p["total"] for p in episode(config, [phi] * (n + 1), similarity)) for n in range(1, 26)]
    assert all(later < earlier for earlier, later in pairwise(returns))
    assert all(p["total"] < 0 for p in episode(config, [phi] * 10, similarity)[:-1])


def test_settings_come_from_a_mapping() -> None:
    assert RewardConfig.from_dict(None) == RewardConfig()
    assert RewardConfig.from_dict({"efficiency": 0.5}).efficiency == 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "much", None])
def test_bad_settings_are_quoted(value: object) -> None:
    with pytest.raises(ValueError, match="'terminal'") as error:
        RewardConfig.from_dict({"terminal": value})
    assert repr(value) in str(error.value)


def test_unknown_settings_are_quoted() -> None:
    with pytest.raises(ValueError, match="unknown reward setting 'nfe'.*efficiency"):
        RewardConfig.from_dict({"nfe": 1})
