"""The reward, recomputed by hand."""

import json
import math
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from addiff_env.env.reward import (
    COMPONENTS,
    DualVariable,
    RewardConfig,
    RunningScale,
    RunningScores,
    quality,
    relative_to_baseline,
    step_reward,
)


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


def relative(config: RewardConfig, ending: dict[str, float], baseline: float | None) -> dict[str, float]:
    """The last step of an episode with its quality counted from ``baseline``, if there is one."""
    if baseline is None:
        return ending
    parts = {name: np.array([value]) for name, value in ending.items()}
    counted = relative_to_baseline(config, parts, np.array([baseline]), np.array([True]))
    return {name: float(value[0]) for name, value in counted.items()}


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
        {"shaping": -0.8, "instability": -0.1, "efficiency": 0, "terminal": 1.8, "fault": 0, "total": 0.9}
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


@given(st.floats(0, 1), st.floats(0.5, 1), st.sampled_from([None, 0.0, 0.3, 1.0]))
@hypothesis_settings(max_examples=40)
def test_mere_continuing_never_pays(phi: float, similarity: float, baseline: float | None) -> None:
    """The published prototype's flaw: constant quality must return less with every further step."""
    config = RewardConfig()

    def total(decisions: int) -> float:
        parts = episode(config, [phi] * (decisions + 1), similarity)
        return sum(p["total"] for p in [*parts[:-1], relative(config, parts[-1], baseline)])

    returns = [total(n) for n in range(1, 26)]
    assert all(later < earlier for earlier, later in pairwise(returns))
    assert all(p["total"] < 0 for p in episode(config, [phi] * 10, similarity)[:-1])


def test_settings_come_from_a_mapping() -> None:
    assert RewardConfig.from_dict(None) == RewardConfig()
    assert RewardConfig.from_dict({"efficiency": 0.5}).efficiency == 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("terminal", value) for value in (math.nan, math.inf, -math.inf, "much", None, True, -0.5)),
        *((f.name, -0.5) for f in fields(RewardConfig) if not f.name.endswith(("_mean", "_std", "gamma", "_unit"))),
        *((name, value) for name in ("clip_std", "reward_std") for value in (0, 0.0, -0.05, math.nan)),
        *(("gamma", value) for value in (0, -0.1, 1.01, math.nan, True)),
        ("clip_mean", math.nan),
    ],
)
def test_bad_settings_are_quoted(name: str, value: object) -> None:
    for make in (RewardConfig.from_dict, lambda values: RewardConfig(**values)):
        with pytest.raises(ValueError, match=f"'{name}'") as error:
            make({name: value})
        assert repr(value) in str(error.value)
    with pytest.raises(ValueError, match=f"'{name}'"):
        replace(RewardConfig(), **{name: value})


@pytest.mark.parametrize("unit", ["flops", "NFE", None, 1])
def test_unknown_units_are_quoted(unit: object) -> None:
    with pytest.raises(ValueError, match="'efficiency_unit'.*nfe, step_flops") as error:
        RewardConfig.from_dict({"efficiency_unit": unit})
    assert repr(unit) in str(error.value)


def test_what_is_not_set_is_the_scorers_own_scale() -> None:
    assert RewardConfig().for_scorer(21.0, 1.5).reward_scale == (21.0, 1.5)
    assert RewardConfig(reward_mean=0.0).for_scorer(21.0, 1.5).reward_scale == (0.0, 1.5)
    assert RewardConfig(reward_std=2.0).for_scorer(21.0, 1.5).reward_scale == (21.0, 2.0)
    with pytest.raises(ValueError, match="scorer"):
        quality(np.zeros(1), np.zeros(1), RewardConfig())
    with pytest.raises(ValueError, match="'reward_std'.*got 0"):
        RewardConfig().for_scorer(0.0, 0.0)


def test_odd_but_sound_settings_are_taken() -> None:
    odd = {"efficiency": 0, "clip_mean": -0.2, "reward_mean": 21, "gamma": 1, "terminal": 0.0}
    assert vars(RewardConfig.from_dict(odd)) == vars(RewardConfig()) | odd


def test_unknown_settings_are_quoted() -> None:
    with pytest.raises(ValueError, match="unknown reward setting 'nfe'.*efficiency"):
        RewardConfig.from_dict({"nfe": 1})


# ------------------------------------------------------------------ a whole trajectory, an MDP


def test_a_short_trajectory_by_hand() -> None:
    """Continue, refine (2 evaluations), stop; scores to quality to every component, with plain arithmetic."""
    scale = {"clip_mean": 0.2, "clip_std": 0.1, "reward_mean": 0.0, "reward_std": 1.0}
    config = RewardConfig(clip_weight=0.5, reward_weight=0.5, gamma=0.9, instability=0.1, **scale)
    scores = [(0.2, 0.0), (0.3, 1.0), (0.1, 2.0), (0.2, 2.0)]  # (CLIP cosine, reward model) of each picture

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    phi = [0.5 * sigmoid((clip - 0.2) / 0.1) + 0.5 * sigmoid(reward) for clip, reward in scores]
    np.testing.assert_allclose(quality(*np.array(scores).T, config), phi, rtol=1e-12)
    similarity, nfe, end = [0.9, 0.5, 1.0], [1, 2, 0], [False, False, True]
    expected = [
        {"shaping": 0.9 * phi[1] - phi[0], "instability": -0.01, "efficiency": -0.01, "terminal": 0.0},
        {"shaping": 0.9 * phi[2] - phi[1], "instability": -0.05, "efficiency": -0.02, "terminal": 0.0},
        {"shaping": -phi[2], "instability": 0.0, "efficiency": 0.0, "terminal": phi[3]},
    ]
    for t in range(3):
        parts = one_step(config, phi[t], phi[t + 1], similarity[t], nfe[t], end[t])
        assert parts == pytest.approx({**expected[t], "fault": 0.0, "total": sum(expected[t].values())})


@given(qualities, st.integers(0, 10))
def test_duplicates_of_a_state_are_never_paid(phis: list[float], at: int) -> None:
    """Standing still (same quality, same picture, no progress) earns nothing, wherever it is put in."""
    at = min(at, len(phis) - 2)
    config = RewardConfig()
    plain = sum(part["total"] for part in episode(config, phis))
    delayed = sum(part["total"] for part in episode(config, [*phis[: at + 1], phis[at], *phis[at + 1 :]]))
    assert delayed < plain
    assert one_step(config, phis[at], phis[at], 1.0, 1, end=False)["total"] < 0


# Two pictures, good and bad; "look again" moves between qualities. States 0..3 are previews, 4 is the end.
PHI = np.array([0.2, 0.5, 0.4, 0.8])
NEXT = {0: {0: 1, 2: 0}, 1: {0: 3, 2: 2}, 2: {0: 3, 2: 1}, 3: {0: 3, 2: 2}}  # action -> next preview; 1 stops
COST = {0: 1, 1: 0, 2: 2}  # evaluations of continue, stop, refine


def action_values(config: RewardConfig, gamma: float, baseline: float | None = None) -> np.ndarray:
    """Q (4, 3) by value iteration, rewards from `step_reward`, and from `relative_to_baseline` if there is one."""
    q = np.full((4, 3), -1e3)  # from below: every policy that never stops is worse than this
    for _ in range(50):
        for state in range(4):
            for action in range(3):
                end = action == 1
                after = state if end else NEXT[state][action]
                step = one_step(config, PHI[state], PHI[after], 1.0, COST[action], end)
                step = relative(config, step, baseline) if end else step
                q[state, action] = step["total"] + (0 if end else gamma * q[after].max())
    return q


@pytest.mark.parametrize("gamma", [1.0, 0.95])
def test_shaping_leaves_the_best_policy_alone(gamma: float) -> None:
    settings = {"gamma": gamma, "instability": 0.0, "efficiency": 0.03}
    plain = action_values(RewardConfig(shaping=0.0, **settings), gamma)
    for weight in (0.5, 1.0, 20.0):
        shaped = action_values(RewardConfig(shaping=weight, **settings), gamma)
        np.testing.assert_array_equal(shaped.argmax(1), plain.argmax(1))
        # Ng, Harada & Russell 1999, theorem 1: shaped Q is plain Q less the weighted potential.
        np.testing.assert_allclose(shaped, plain - weight * PHI[:, None], atol=1e-9)
    assert set(plain.argmax(1)) > {1}  # the problem is not trivial: not every state stops


@pytest.mark.parametrize("baseline", [0.1, 0.5, 0.95])
def test_a_baseline_leaves_the_best_policy_alone(baseline: float) -> None:
    """Every state of the MDP reaches the end exactly once, whatever is done: all values move by the baseline."""
    config = RewardConfig(instability=0.0, efficiency=0.03, terminal=2.0)
    plain, counted = (action_values(config, 1.0, level) for level in (None, baseline))
    np.testing.assert_array_equal(counted.argmax(1), plain.argmax(1))
    np.testing.assert_allclose(counted, plain - 2 * baseline, atol=1e-9)


def test_a_discounted_baseline_is_refused() -> None:
    """Taken off at the end it weighs less the later an episode ends: the best policy would be another one."""
    with pytest.raises(ValueError, match=r"gamma 1, got 0\.95.*longer"):
        action_values(RewardConfig(gamma=0.95), 0.95, 0.5)


# ------------------------------------------------------------------ what is charged


@pytest.mark.parametrize("unit", ["nfe", "step_flops"])
def test_efficiency_is_charged_in_its_unit(unit: str, small_kwargs: dict[str, Any]) -> None:
    """A decision's price: its evaluations, or its whole increase of net FLOPs in denoiser steps."""
    reward = {"efficiency": 0.5, "efficiency_unit": unit}
    settings = small_kwargs | {"reward": reward, "finish_steps": 1, "observe_every": 2, "guidance_scale": 3.0}
    env: Any = gym.make_vec("AdDiffusion-Tiny-v0", num_envs=3, **settings).unwrapped
    assert env.reward_config.reward_scale == (0.0, 1.0)  # the packaged scorer's
    _, before = env.reset(seed=0)
    step = 2 * env.flops_per_call["denoiser"]  # a guidance pair
    for actions in ([0, 2, 0], [0, 0, 1], [2, 0, 0]):
        _, _, ended, _, info = env.step(np.array(actions))
        running = info["nfe"] >= before["nfe"]  # a lane that starts anew pays nothing for that
        spent = {name: (info[name] - before[name])[running] for name in ("nfe", "net_flops")}
        expected = spent["nfe"] if unit == "nfe" else spent["net_flops"] / step
        np.testing.assert_allclose(info["reward_components"]["efficiency"][running], -0.5 * expected, rtol=1e-12)
        assert (spent["net_flops"][spent["nfe"] > 0] / step >= spent["nfe"][spent["nfe"] > 0]).all()
        before = info
    assert (expected > 0).any()


# ------------------------------------------------------------------ baselines, running scales, dual variable


def test_a_baseline_is_taken_off_every_ending_and_no_other_step() -> None:
    config = RewardConfig(terminal=2.0)
    end, fault = np.array([True, True, False]), np.array([False, True, False])
    parts = step_reward(config, *np.full((3, 3), 0.5), np.ones(3, int), end, fault)
    relative = relative_to_baseline(config, parts, np.array([0.3, 0.3, np.nan]), end)
    np.testing.assert_allclose(relative["terminal"], [2 * (0.5 - 0.3), -0.6, 0])
    np.testing.assert_allclose(relative["total"], parts["total"] - [0.6, 0.6, 0])
    np.testing.assert_allclose(sum(relative[name] for name in COMPONENTS), relative["total"])
    assert parts["terminal"][0] == 1.0  # the original is left alone
    with pytest.raises(ValueError, match="nan"):
        relative_to_baseline(config, parts, np.array([np.nan, 0.3, 0.3]), end)


finite = st.floats(-1e3, 1e3)


@given(st.lists(st.lists(finite, max_size=8), max_size=8))
def test_running_scale_equals_numpy_on_everything(batches: list[list[float]]) -> None:
    scale = RunningScale()
    for batch in batches:
        scale.update(np.array([*batch, np.nan]))
    seen = np.concatenate([np.array(batch) for batch in batches]) if batches else np.zeros(0)
    assert scale.count == len(seen)
    if len(seen) > 1:
        assert scale.mean == pytest.approx(seen.mean(), abs=1e-8)
        assert scale.std == pytest.approx(seen.std(), rel=1e-6, abs=1e-5)


def test_running_scores_replace_the_configured_scales_once_trusted(rng: np.random.Generator) -> None:
    config, scores = RewardConfig().for_scorer(0.0, 1.0), RunningScores()
    clip, reward = rng.normal(0.6, 0.1, 200), rng.normal(-3, 4, 200)
    scores.update(clip[:10], reward[:10])
    assert scores.apply(config) == config
    scores.update(clip[10:], reward[10:])
    applied = scores.apply(config)
    assert (applied.clip_mean, applied.clip_std) == pytest.approx((clip.mean(), clip.std()))
    assert (applied.reward_mean, applied.reward_std) == pytest.approx((reward.mean(), reward.std()))
    assert applied.efficiency == config.efficiency
    again = RunningScores()
    again.load_state_dict(json.loads(json.dumps(scores.state_dict())))
    assert again.apply(config) == applied
    constant = RunningScores()
    constant.update(np.full(100, 0.25), np.zeros(100))
    assert constant.apply(config).clip_std == RunningScores.least_std


@pytest.mark.parametrize("start", [1e-4, 0.3])
def test_dual_variable_finds_the_price_of_a_target(start: float) -> None:
    """Toy: a policy that maximises 2 log(n) - c n evaluates n = 2 / c times; 10 evaluations cost c = 0.2."""
    dual = DualVariable(target_nfe=10, value=start, rate=0.1)
    for _ in range(400):
        dual.update(min(2 / dual.value, 50))
    assert dual.value == pytest.approx(0.2, rel=1e-3)


def test_dual_variable_moves_the_right_way_and_stays_in_bounds() -> None:
    dual = DualVariable(target_nfe=10, value=0.01, rate=0.05)
    assert dual.update(20) == pytest.approx(0.01 * math.exp(0.05))
    assert dual.update(10) == pytest.approx(0.01 * math.exp(0.05))
    assert not dual.at_bound
    for _ in range(2000):
        dual.update(0)
    assert dual.value == dual.least and dual.at_bound
    for name, value in (("target_nfe", 0), ("rate", -1), ("value", math.nan), ("value", 1.5)):
        with pytest.raises(ValueError, match=f"{name}.*{value}"):
            DualVariable(**{"target_nfe": 10, name: value})
