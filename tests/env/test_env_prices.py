"""The price of an evaluation: drawn per episode, named by ``reset``, charged by the reward, seen in the observation."""

import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from addiff_env.env import DiffusionDenoiseVectorEnv
from addiff_env.env.prices import check_price, position, price_at, read_price_range, start_prices
from addiff_env.perception.features import QUALITY

ID = "AdDiffusion-Tiny-v0"
CONTINUE, STOP, REFINE = range(3)
RANGE = (0.001, 0.016)
PROMPTS = ["a red circle", "two blue squares", "a star above a green ring", "a pink cross and a large circle"]
Kwargs = dict[str, Any]
prices = st.floats(1e-8, 10)
ranges = st.tuples(prices, prices).map(sorted)


def vector(kwargs: Kwargs, num_envs: int = 3, mode: AutoresetMode = AutoresetMode.DISABLED, **more: Any) -> Any:
    settings = {**kwargs, "price_range": RANGE, **more}
    return gym.make_vec(ID, num_envs=num_envs, autoreset_mode=mode, **settings).unwrapped


def named(seeds: list[int], **more: Any) -> dict[str, Any]:
    return {"prompt": [PROMPTS[seed % len(PROMPTS)] for seed in seeds], "seed": seeds, **more}


# ------------------------------------------------------------------ the numbers


@given(ranges, st.floats(-1, 1))
def test_prices_and_positions_are_each_others_reverse(bounds: list[float], where: float) -> None:
    price = float(price_at(bounds, where))
    assert bounds[0] <= price <= bounds[1]
    back = float(position(bounds, price))
    assert -1 <= back <= 1
    assert float(price_at(bounds, back)) == pytest.approx(price, rel=1e-9)


@given(ranges)
def test_the_ends_of_a_range_are_minus_one_and_one(bounds: list[float]) -> None:
    ends = position(bounds, np.array(bounds))
    expected = [0, 0] if bounds[0] == bounds[1] else [-1, 1]
    np.testing.assert_allclose(ends, expected, atol=1e-6)


@given(ranges, st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=8), st.randoms())
def test_a_drawn_price_is_its_seeds_whoever_else_is_drawn(bounds: list[float], seeds: list[int], order: Any) -> None:
    together = dict(zip(seeds, start_prices(seeds, None, bounds), strict=True))
    shuffled = sorted(seeds, key=lambda _: order.random())
    assert [start_prices([seed], None, bounds)[0] for seed in shuffled] == [together[seed] for seed in shuffled]
    assert all(bounds[0] <= price <= bounds[1] for price in together.values())


def test_drawn_prices_are_log_uniform() -> None:
    where = position(RANGE, start_prices(range(2000), None, RANGE))
    counts, _ = np.histogram(where, bins=8, range=(-1, 1))
    assert counts.min() > 190 and counts.max() < 310  # 250 each, 4 standard deviations


@pytest.mark.parametrize("value", [0.001, np.float32(0.016), np.array(0.01), torch.tensor(0.001), "x", None, [0.01]])
def test_a_price_is_a_number_within_its_range(value: Any) -> None:
    if value in ("x", None) or isinstance(value, list):
        with pytest.raises(ValueError, match="price must be"):
            check_price(value, RANGE)
    else:
        assert RANGE[0] <= check_price(value, RANGE) <= RANGE[1]


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor])
def test_ranges_come_in_any_form(form: Any) -> None:
    assert read_price_range(form([0.25, 0.5])) == (0.25, 0.5)


# ------------------------------------------------------------------ conformance


@pytest.mark.parametrize("obs_mode", ["flat", "dict"])
def test_the_environment_conforms(small_kwargs: Kwargs, obs_mode: str) -> None:
    env = gym.make(ID, **small_kwargs, price_range=RANGE, obs_mode=obs_mode, render_mode="rgb_array").unwrapped
    check_env(env)
    sb3_check_env(env)


def test_the_setting_survives_a_spec(small_kwargs: Kwargs) -> None:
    for value in (list(RANGE), np.array(RANGE)):
        spec = gym.make(ID, **small_kwargs, price_range=value).spec
        assert spec is not None
        for again in (pickle.loads(pickle.dumps(spec)), gym.envs.registration.EnvSpec.from_json(spec.to_json())):
            assert gym.make(again).unwrapped.config.price_range == RANGE  # type: ignore[attr-defined]


def test_wrappers_take_prices(small_kwargs: Kwargs) -> None:
    made = gym.make_vec(ID, num_envs=2, autoreset_mode=AutoresetMode.NEXT_STEP, **small_kwargs, price_range=RANGE)
    env = RecordEpisodeStatistics(made)
    observation, info = env.reset(seed=3)
    for _ in range(6):
        assert env.observation_space.contains(observation) and info["price"].shape == (2,)
        observation, _, _, _, info = env.step(np.ones(2, np.int64))


# ------------------------------------------------------------------ the observation


def test_the_price_is_one_more_part(small_kwargs: Kwargs) -> None:
    plain, priced = vector(small_kwargs, price_range=None), vector(small_kwargs)
    ours, theirs = (env.reset(options=named([3, 4, 5]))[0] for env in (priced, plain))
    at = [*priced.parts].index("price")
    column = sum([*priced.parts.values()][:at])
    assert priced.parts.pop("price") == 1 and {**priced.parts, "price": 1} != plain.parts
    np.testing.assert_array_equal(np.delete(ours, column, axis=1), theirs)  # nothing else moves
    np.testing.assert_allclose(ours[:, column], position(RANGE, priced.price), rtol=1e-6)
    by_name = vector(small_kwargs, obs_mode="dict").reset(options=named([3, 4, 5]))[0]
    np.testing.assert_array_equal(by_name["price"][:, 0], ours[:, column])


def test_the_quality_numbers_stay_last(small_kwargs: Kwargs) -> None:
    """Hand-made rules read them from the end."""
    assert [*vector(small_kwargs).parts.items()][-1] == ("quality", len(QUALITY))


def test_without_a_range_nothing_is_seen_of_a_named_price(small_kwargs: Kwargs) -> None:
    env = vector(small_kwargs, price_range=None)
    plain, _ = env.reset(options=named([1, 2, 3]))
    dear, info = env.reset(options=named([1, 2, 3], price=0.5))
    np.testing.assert_array_equal(plain, dear)
    assert info["price"].tolist() == [0.5] * 3


@settings(max_examples=5)
@given(st.lists(st.floats(RANGE[0], RANGE[1]), min_size=3, max_size=3))
def test_observations_lie_in_their_space(small_kwargs: Kwargs, asked: list[float]) -> None:
    env = _one_for_all(small_kwargs)
    observation, info = env.reset(options=named([1, 2, 3], price=asked))
    assert env.observation_space.contains(observation)
    np.testing.assert_allclose(info["price"], asked)


_CACHE: dict[str, Any] = {}


def _one_for_all(kwargs: Kwargs) -> DiffusionDenoiseVectorEnv:
    return _CACHE.setdefault("env", vector(kwargs))


# ------------------------------------------------------------------ the reward


@settings(max_examples=5)
@given(st.lists(st.sampled_from([CONTINUE, STOP, REFINE]), min_size=1, max_size=6), st.data())
def test_the_reward_moves_by_price_times_evaluations(small_kwargs: Kwargs, plan: list[int], data: Any) -> None:
    """The same decisions at two prices: the rewards differ by the difference of prices times what was evaluated."""
    env = _one_for_all(small_kwargs)
    cheap, dear = (data.draw(st.lists(st.floats(*RANGE), min_size=3, max_size=3)) for _ in range(2))
    first, second = (_play(env, [7, 8, 9], plan, price=price) for price in (cheap, dear))
    for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours["evaluated"], theirs["evaluated"])
        expected = (np.array(dear) - np.array(cheap)) * ours["evaluated"]
        np.testing.assert_allclose(ours["reward"] - theirs["reward"], expected, atol=1e-9)
        np.testing.assert_allclose(ours["efficiency"], -np.array(cheap) * ours["evaluated"], atol=1e-12)


def _play(env: Any, seeds: list[int], plan: list[int], **options: Any) -> list[dict[str, Any]]:
    _, info = env.reset(options=named(seeds, **options))
    rows = []
    for action in plan:
        if env.done.all():
            break
        before = info["nfe"]
        _, reward, _, _, info = env.step([action] * env.num_envs)
        parts = info["reward_components"]
        rows.append({"evaluated": info["nfe"] - before, "reward": reward, "efficiency": parts["efficiency"].copy()})
    return rows


@settings(max_examples=4)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=4, unique=True), st.data())
def test_how_lanes_are_batched_changes_neither_prices_nor_charges(
    small_kwargs: Kwargs, seeds: list[int], data: Any
) -> None:
    cut = data.draw(st.integers(0, len(seeds)))
    plan = [CONTINUE, REFINE, STOP]

    def charged(group: list[int]) -> list[tuple[float, list[float]]]:
        if not group:
            return []
        env = _CACHE.setdefault(f"of {len(group)}", None) or vector(small_kwargs, len(group))
        _CACHE[f"of {len(group)}"] = env
        rows = _play(env, group, plan)
        return [(env.price[k], [row["efficiency"][k] for row in rows]) for k in range(len(group))]

    assert charged(seeds) == charged(seeds[:cut]) + charged(seeds[cut:])


def test_flops_are_charged_at_the_lanes_price_too(small_kwargs: Kwargs) -> None:
    env = vector(small_kwargs, reward={"efficiency_unit": "step_flops"})
    env.reset(options=named([1, 2, 3], price=[0.001, 0.002, 0.004]))
    before = env.net_flops.copy()
    _, _, _, _, info = env.step([CONTINUE] * 3)
    steps = (env.net_flops - before) / (env.passes_per_nfe * env.flops_per_call["denoiser"])
    np.testing.assert_allclose(info["reward_components"]["efficiency"], -np.array([0.001, 0.002, 0.004]) * steps)


def test_a_named_price_holds_for_one_episode(small_kwargs: Kwargs) -> None:
    env = vector(small_kwargs, price_range=None, reward={"efficiency": 0.25})
    assert env.reset(options=named([1, 2, 3], price=[None, 0.5, 0]))[1]["price"].tolist() == [0.25, 0.5, 0]
    env.set_reward(env.reward_config.__class__(efficiency=0.125, reward_mean=0, reward_std=1))
    assert env.price.tolist() == [0.125, 0.5, 0]  # the reward's own may move, e.g. to a target
    assert env.reset(options=named([1, 2, 3]))[1]["price"].tolist() == [0.125] * 3


# ------------------------------------------------------------------ resets


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_each_new_episode_has_its_seeds_price(small_kwargs: Kwargs, mode: AutoresetMode) -> None:
    env = vector(small_kwargs, 2, mode)
    _, info = env.reset(seed=5, options={"price": [RANGE[0], RANGE[1]]})
    assert info["price"].tolist() == list(RANGE)
    seen = set()
    for step in range(8):
        _, _, terminated, _, info = env.step([STOP, CONTINUE if step % 3 else STOP])
        if mode == AutoresetMode.SAME_STEP and step == 0:
            assert info["final_info"]["price"][0] == RANGE[0]  # charged until the end
        fresh = ~env.done & (env.decisions == 0)
        np.testing.assert_array_equal(env.price[fresh], start_prices(env.seed[fresh], None, RANGE))
        seen |= set(env.price[fresh].tolist())
    assert len(seen) > 3


def test_a_reset_mask_leaves_the_others_prices_alone(small_kwargs: Kwargs) -> None:
    env = vector(small_kwargs)
    env.reset(options=named([1, 2, 3], price=[0.002, 0.003, 0.004]))
    mask = np.array([False, True, False])
    env.reset(options={"price": [0.01], "reset_mask": mask})
    assert env.price.tolist() == [0.002, 0.01, 0.004]
    env.reset(options={"price": 0.005, "reset_mask": ~mask})
    assert env.price.tolist() == [0.005, 0.01, 0.005]


def test_lanes_that_never_started_are_no_nonsense(small_kwargs: Kwargs) -> None:
    env = vector(small_kwargs)
    observation, info = env.reset(options={"reset_mask": np.array([False, True, False])})
    assert np.isfinite(observation).all() and env.observation_space.contains(observation)


def test_single_and_vector_environments_agree(small_kwargs: Kwargs) -> None:
    env = gym.make(ID, **small_kwargs, price_range=RANGE).unwrapped
    envs = vector(small_kwargs, 2)
    _, info = envs.reset(options=named([21, 22]))
    for lane, seed in enumerate([21, 22]):
        assert env.reset(options={"prompt": PROMPTS[0], "seed": seed})[1]["price"] == info["price"][lane]
    assert env.reset(options={"price": 0.003})[1]["price"] == 0.003
    assert env.reset(seed=9)[1]["price"] == env.reset(seed=9)[1]["price"]
    with pytest.raises(ValueError, match=r"price must be .* got \[0.003\]"):
        env.reset(options={"price": [0.003]})


def test_noise_and_prompts_are_those_of_the_seed_without_prices(small_kwargs: Kwargs) -> None:
    plain, priced = vector(small_kwargs, price_range=None), vector(small_kwargs)
    for env in (plain, priced):
        env.reset(seed=4)
        env.step([CONTINUE, REFINE, CONTINUE])
    assert plain.prompt == priced.prompt and plain.seed.tolist() == priced.seed.tolist()
    assert torch.equal(plain.latents, priced.latents)


@pytest.mark.parametrize("price", [0.0, -0.004, float("nan"), float("inf"), 0.02, "0.004", True, 10**400])
def test_bad_prices_are_shown_and_change_nothing(small_kwargs: Kwargs, price: Any) -> None:
    env, single = vector(small_kwargs), gym.make(ID, **small_kwargs, price_range=RANGE).unwrapped
    env.reset(options=named([1, 2, 3], price=0.004))
    for asked in (price, [0.004, price, 0.004]):
        with pytest.raises(ValueError, match=f"price must .*{str(price)[:50]}"):
            env.reset(options={"price": asked})
    with pytest.raises(ValueError, match="price must"):
        single.reset(options={"price": price})
    assert env.price.tolist() == [0.004] * 3 and env.seed.tolist() == [1, 2, 3]


@pytest.mark.parametrize("asked", [[0.004], [0.004] * 4, []])
def test_one_price_per_lane_or_one_for_all(small_kwargs: Kwargs, asked: list[float]) -> None:
    with pytest.raises(ValueError, match=f"{len(asked)} price values for 3 lanes"):
        vector(small_kwargs).reset(options={"price": asked})


# ------------------------------------------------------------------ saved states


def test_prices_are_saved(small_kwargs: Kwargs) -> None:
    first, second = (vector(small_kwargs, mode=AutoresetMode.SAME_STEP) for _ in range(2))
    first.reset(seed=1)
    first.step([CONTINUE, STOP, REFINE])
    second.reset(seed=2)
    second.load_state_dict(first.state_dict())
    for actions in ([STOP, CONTINUE, STOP], [CONTINUE, STOP, STOP], [STOP] * 3):
        ours, theirs = first.step(actions), second.step(actions)
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1])
        np.testing.assert_array_equal(ours[4]["price"], theirs[4]["price"])


@pytest.mark.parametrize("other", [None, (0.1, 0.2)])
def test_a_state_of_another_range_is_refused(small_kwargs: Kwargs, other: Any) -> None:
    there, here = vector(small_kwargs, price_range=other), vector(small_kwargs)
    there.reset(seed=1)
    here.reset(seed=2)
    before = here.price
    with pytest.raises(ValueError, match="price_range"):
        here.load_state_dict(there.state_dict())
    assert here.price.tolist() == before.tolist()
