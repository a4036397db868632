"""Mandatory steps that are deferred, actions that share batches and overlap, and budgets of single lanes."""

import gc
import weakref
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

from addiff_env.env import DiffusionDenoiseVectorEnv
from addiff_env.env.config import EnvConfig

Kwargs = dict[str, Any]
PROMPTS = ["a red circle", "two blue squares", "a star above a green ring"]


def vector(kwargs: Kwargs, num_envs: int, **more: Any) -> DiffusionDenoiseVectorEnv:
    modes: Kwargs = {"num_envs": num_envs, "autoreset_mode": AutoresetMode.DISABLED}
    found = gym.make_vec("AdDiffusion-Tiny-v0", **modes | kwargs | more).unwrapped
    assert isinstance(found, DiffusionDenoiseVectorEnv)
    return found


@pytest.fixture(scope="module")
def envs(small_kwargs: Kwargs) -> dict[int, DiffusionDenoiseVectorEnv]:
    return {number: vector(small_kwargs, number) for number in (1, 3)}


def options(lane: int, **more: Any) -> Kwargs:
    mask = np.arange(3) == lane
    return {"prompt": [PROMPTS[lane]], "seed": [7 + lane], "reset_mask": mask, **more}


def alone(env: DiffusionDenoiseVectorEnv, lane: int, actions: list[int]) -> list[tuple[Any, ...]]:
    """What a lane shows at each decision when nobody is beside it: observation, reward, nfe, whether it has ended."""
    observation, info = env.reset(options={"prompt": [PROMPTS[lane]], "seed": [7 + lane]})
    shown = [(observation[0], 0.0, int(info["nfe"][0]), False)]
    for action in actions:
        if env.done[0]:
            break
        observation, reward, terminated, _, info = env.step([action])
        shown.append((observation[0], float(reward[0]), int(info["nfe"][0]), bool(terminated[0])))
    return shown


@settings(max_examples=12)
@given(
    starts=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    actions=st.lists(st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=8, max_size=8), min_size=3, max_size=3),
    sharing=st.sampled_from([(False, False), (True, False), (True, True)]),
)
def test_lanes_that_warm_up_and_act_beside_others_show_what_they_show_alone(
    envs: dict[int, DiffusionDenoiseVectorEnv],
    starts: list[int],
    actions: list[list[int]],
    sharing: tuple[bool, bool],
) -> None:
    expected = [alone(envs[1], lane, actions[lane]) for lane in range(3)]
    env, shown, steps, paid = envs[3], [[] for _ in range(3)], [0] * 3, np.zeros(3)  # type: ignore[var-annotated]
    env.park(np.arange(3))
    env.share_batches(*sharing)
    for tick in range(30):
        for lane in (lane for lane in range(3) if starts[lane] == tick):
            observation, info = env.reset(options=options(lane, defer_warmup=True))
            assert env.warming[lane] and info["nfe"][lane] == 0 and observation[lane] in env.single_observation_space
        running = np.flatnonzero(~env.done)
        if len(running) == 0:
            continue
        warming, deciding, acting = env.warming.copy(), env.deciding, (env.deciding | env.busy) & ~env.done
        choice = np.ones(3, int)  # an action that a lane must not heed unless it decides
        for lane in np.flatnonzero(deciding):
            choice[lane] = actions[lane][steps[lane]] if steps[lane] < 8 else 1
            steps[lane] += 1
        observation, reward, terminated, _, info = env.step(choice)
        assert (info["action_taken"] >= 0).tolist() == (acting & ~env.busy).tolist()
        assert not reward[warming].any()
        assert sharing[1] or not env.busy.any()
        paid += reward
        for lane in running:
            if not env.warming[lane] and not env.busy[lane]:
                values = observation[lane], paid[lane], int(info["nfe"][lane]), bool(terminated[lane])
                shown[lane].append(values)
                paid[lane] = 0
    env.share_batches(False)
    for found, wanted in zip(shown, expected, strict=True):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert one[0] == pytest.approx(other[0], abs=2e-3) and one[1] == pytest.approx(other[1], abs=2e-3)
            assert one[2:] == other[2:]


def batch_sizes(env: DiffusionDenoiseVectorEnv, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many lanes each call of the denoiser is about, from now on."""
    sizes: list[int] = []
    predict = env.backbone.predict

    def spy(latents: Any, *args: Any) -> Any:
        sizes.append(len(latents))
        return predict(latents, *args)

    monkeypatch.setattr(env.backbone, "predict", spy)
    return sizes


def test_actions_do_not_overlap_in_batches_of_their_own(small_kwargs: Kwargs) -> None:
    with pytest.raises(ValueError, match="shared False and overlap True"):
        vector(small_kwargs, 1).share_batches(False, overlap=True)


@pytest.mark.parametrize("more", [{}, {"refine_mode": "in_place"}, {"solver": "dpmpp_2m"}, {"eta": 0.5}])
def test_lanes_of_different_actions_share_a_batch_where_they_may(
    small_kwargs: Kwargs, monkeypatch: pytest.MonkeyPatch, more: Kwargs
) -> None:
    env = vector(small_kwargs, 5, finish_steps=2, num_inference_steps=8, max_nfe=20, **more)
    sizes = batch_sizes(env, monkeypatch)
    shown = []
    for shared, expected in ((False, [2, 2, 2, 1, 1]), (True, [5, 3]), (False, [2, 2, 2, 1, 1])):
        env.share_batches(shared)
        env.reset(options={"prompt": (PROMPTS * 2)[:5], "seed": list(range(5))})
        sizes.clear()
        observation, reward, terminated, _, info = env.step([0, 2, 1, 0, 2])
        assert sizes == expected
        drawn = [generator.get_state().numpy() for generator in env.state.generators]
        exact = [terminated, info["nfe"], info["net_flops"], info["step_index"], info["action_taken"], drawn]
        shown.append((exact, [observation, reward, env.refine_mask, env.final_image(2) / 255]))
    for exact, close in shown[1:]:
        for one, other in zip(exact, shown[0][0], strict=True):
            np.testing.assert_array_equal(one, other)
        for one, other in zip(close, shown[0][1], strict=True):
            np.testing.assert_allclose(one, other, atol=5e-3)
    for one, other in zip(shown[2][1], shown[0][1], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("more", [{}, {"refine_mode": "in_place"}, {"solver": "dpmpp_2m"}, {"eta": 0.5}])
def test_actions_that_overlap_keep_the_batch_full_and_change_no_lane(
    small_kwargs: Kwargs, monkeypatch: pytest.MonkeyPatch, more: Kwargs
) -> None:
    env = vector(small_kwargs, 5, finish_steps=2, num_inference_steps=6, max_nfe=12, **more)
    rng = np.random.default_rng(0)
    chosen = rng.choice(3, (5, 12), p=[0.5, 0.1, 0.4])
    sizes = batch_sizes(env, monkeypatch)
    ends = []
    for overlap in (False, True):
        env.share_batches(True, overlap)
        env.reset(options={"prompt": (PROMPTS * 2)[:5], "seed": list(range(5))})
        sizes.clear()
        steps, calls, returns, taken = np.zeros(5, int), 0, np.zeros(5), [[] for _ in range(5)]  # type: ignore[var-annotated]
        while not env.done.all():
            deciding, running = env.deciding, int((~env.done).sum())
            _, reward, _, _, info = env.step(chosen[np.arange(5), np.minimum(steps, 11)])
            steps += deciding
            returns += reward
            for lane in np.flatnonzero(info["action_taken"] >= 0):
                taken[lane].append(int(info["action_taken"][lane]))
            calls += 1
            assert not overlap or sizes[-1] == running  # one evaluation of each lane that runs
        assert not overlap or len(sizes) == calls
        drawn = [generator.get_state().numpy() for generator in env.state.generators]
        exact = [taken, info["nfe"], info["net_flops"], info["step_index"], drawn]
        ends.append((exact, [returns, np.stack([env.final_image(lane) for lane in range(5)]) / 255]))
    env.share_batches(False)
    assert ends[1][0][0] == ends[0][0][0] and any(2 in actions for actions in ends[0][0][0])
    for one, other in zip(ends[1][0][1:], ends[0][0][1:], strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(ends[1][1], ends[0][1], strict=True):
        np.testing.assert_allclose(one, other, atol=5e-3)


def test_a_lane_in_the_middle_of_an_action_is_left_alone_until_it_has_ended_it(small_kwargs: Kwargs) -> None:
    env = vector(small_kwargs, 2, finish_steps=2, num_inference_steps=6, max_nfe=12)
    env.share_batches(True, overlap=True)
    env.reset(options={"prompt": PROMPTS[:2], "seed": [0, 1]})
    *_, info = env.step([0, 1])
    assert env.busy.tolist() == [False, True] and info["action_taken"].tolist() == [0, -1]
    for forbidden in (
        env.state_dict,
        lambda: env.park([1]),
        lambda: env.reset(options={"reset_mask": np.array([False, True])}),
    ):
        with pytest.raises(RuntimeError, match=r"lanes \[1\] are in the middle of an action"):
            forbidden()
    env.park([0])
    _, _, terminated, _, info = env.step([1, 0])  # not heeded by the lane that stops
    assert terminated.tolist() == [True, True] and info["action_taken"].tolist() == [-1, 1]
    assert env.final_image(1).any() and not env.busy.any()
    env.reset(options={"prompt": PROMPTS[:2], "seed": [0, 1]})
    env.step([2, 1])
    env.share_batches(False)  # gives up what is under way
    env.park([0, 1])
    whole = env.state_dict()
    env.share_batches(True, overlap=True)
    env.reset(options={"prompt": PROMPTS[:2], "seed": [0, 1]})
    env.step([2, 1])
    env.load_state_dict(whole)  # as does this
    assert env.done.all() and not env.busy.any()


def test_closing_gives_up_what_is_under_way_and_lets_go_of_the_model(small_kwargs: Kwargs) -> None:
    env = vector(small_kwargs, 2, finish_steps=2, num_inference_steps=6, max_nfe=12)
    env.share_batches(True, overlap=True)
    env.reset(options={"prompt": PROMPTS[:2], "seed": [0, 1]})
    env.step([2, 1])
    assert env.busy.all()
    held = weakref.ref(env.denoiser)
    env.close()
    gc.collect()
    assert held() is None and not env.busy.any()


def test_without_a_warm_up_there_is_nothing_to_defer(small_kwargs: Kwargs) -> None:
    env = vector(small_kwargs, 2, warmup_steps=0)
    results = []
    for defer in (False, True):
        observation, _ = env.reset(options={"prompt": PROMPTS[:2], "seed": [1, 2], "defer_warmup": defer})
        assert not env.warming.any()
        results.append([observation, *env.step([0, 0])[:2]])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_lanes_that_restart_by_themselves_warm_up_at_once(small_kwargs: Kwargs, mode: AutoresetMode) -> None:
    env = vector(small_kwargs, 2, autoreset_mode=mode)
    env.reset(seed=0)
    for _ in range(4):
        env.step([1, 0])
        assert not env.warming.any()


@settings(max_examples=6)
@given(budgets=st.lists(st.integers(3, 14), min_size=3, max_size=3), action=st.sampled_from([0, 2]))
def test_a_lanes_own_budget_is_what_the_setting_would_be(
    small_kwargs: Kwargs, envs: dict[int, DiffusionDenoiseVectorEnv], budgets: list[int], action: int
) -> None:
    env = envs[3]
    env.reset(options={"prompt": PROMPTS, "seed": [7, 8, 9], "max_nfe": budgets})
    shown = []
    while not env.done.all():
        observation, _, terminated, _, info = env.step([action] * 3)
        shown.append((observation, info["nfe"], info["action_taken"]))
    for lane, budget in enumerate(budgets):
        other = vector(small_kwargs, 3, max_nfe=budget)
        other.reset(options={"prompt": PROMPTS, "seed": [7, 8, 9]})
        for observation, nfe, taken in shown:
            if other.done[lane]:
                break
            theirs, _, _, _, info = other.step([action] * 3)
            assert (info["nfe"][lane], info["action_taken"][lane]) == (nfe[lane], taken[lane])
            assert observation[lane] == pytest.approx(theirs[lane], abs=1e-3)
        assert other.done[lane] and nfe[lane] <= budget


@pytest.mark.parametrize("value", [0, 2, 2.5, "7", True, [5], [5, 5, None, 5], {"a": 1}])
def test_budgets_that_leave_no_decision_are_shown(envs: dict[int, DiffusionDenoiseVectorEnv], value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="max_nfe"):
        envs[3].reset(options={"max_nfe": value})
    envs[3].reset(options={"max_nfe": 5})
    assert envs[3].budget.tolist() == [5] * 3
    envs[3].reset(options={"max_nfe": [None, 6, np.int64(7)]})
    assert envs[3].budget.tolist() == [EnvConfig.nfe_budget.fget(envs[3].config), 6, 7]  # type: ignore[attr-defined]


def test_what_is_no_switch_is_shown(envs: dict[int, DiffusionDenoiseVectorEnv]) -> None:
    with pytest.raises(ValueError, match="defer_warmup must be True or False, got 1"):
        envs[3].reset(options={"defer_warmup": 1})


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
@pytest.mark.parametrize("looker", ["scorer", "clip", "dino"])
def test_a_look_without_numbers_is_passed_over_and_a_final_one_is_a_fault(
    small_kwargs: Kwargs, monkeypatch: pytest.MonkeyPatch, looker: str, value: float
) -> None:
    """As half precision may give. Nothing that a learner sees is NaN, and the lane beside it does not notice."""
    env = vector(small_kwargs, 2)
    named = {"prompt": PROMPTS[:2], "seed": [7, 8]}
    actions = [np.array([0, 0]), np.array([0, 2]), np.array([1, 1])]
    env.reset(options=named)
    expected = [env.step(action) for action in actions]
    kind, method = type(getattr(env.perception, looker)), "score" if looker == "scorer" else "image_features"
    whole = getattr(kind, method)

    def spoiled(self: Any, pictures: Any, *prompts: Any) -> Any:
        found = whole(self, pictures, *prompts)
        found[-1] = value  # of both lanes, or of the one that is looked at alone
        return found

    first, info = env.reset(options=named)
    monkeypatch.setattr(kind, method, spoiled)
    for action, (observation, reward, terminated, _, _) in zip(actions, expected, strict=True):
        now, paid, ended, _, info = env.step(action)
        assert np.isfinite(now).all() and np.isfinite(paid).all() and np.isfinite(info["reward_components"]).all()
        np.testing.assert_allclose(now[0], observation[0], atol=1e-4)
        assert paid[0] == pytest.approx(reward[0], abs=1e-4) and ended[0] == terminated[0]
        if looker == "scorer" and np.isnan(value):
            assert info["reward_score"][1] == pytest.approx(first[1, -6], abs=1e-4)  # of the last look that had one
    is_clamped = looker == "scorer" and np.isinf(value)  # a score beyond its limit is the limit
    assert info["fault"].tolist() == [False, not is_clamped]
    assert ended.all() and env.final_image(1).shape == (64, 64, 3)
