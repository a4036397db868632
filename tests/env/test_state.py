"""An environment's saved state: another one goes on from it exactly."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from addiff_env.env.reward import RewardConfig
from addiff_env.env.state import LaneState

ID = "AdDiffusion-Tiny-v0"


def make(kwargs: dict[str, Any], num_envs: int = 3, mode: AutoresetMode = AutoresetMode.SAME_STEP, **more: Any) -> Any:
    return gym.make_vec(ID, num_envs=num_envs, autoreset_mode=mode, **{**kwargs, **more}).unwrapped


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"solver": "dpmpp_2m", "mask": "random"},  # solver history; masks drawn from the lanes' generators
        {"eta": 0.7, "obs_mode": "dict", "observe_every": 2},
    ],
    ids=str,
)
def test_another_environment_goes_on_exactly(small_kwargs: dict[str, Any], tmp_path: Path, more: Any) -> None:
    rng = np.random.default_rng(0)
    actions = rng.choice(3, size=(14, 3), p=[0.6, 0.15, 0.25])
    first, second = make(small_kwargs, **more), make(small_kwargs, **more)
    first.reset(seed=11)
    for action in actions[:6]:
        first.step(action)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.reset(seed=99)
    second.step(actions[0])
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for action in actions[6:]:
        ours, theirs = first.step(action), second.step(action)
        as_dict = [o if isinstance(o, dict) else {"flat": o} for o in (ours[0], theirs[0])]
        for name, value in as_dict[0].items():
            np.testing.assert_array_equal(as_dict[1][name], value)
        for left, right in zip(ours[1:4], theirs[1:4], strict=True):
            np.testing.assert_array_equal(left, right)
        for name in ("prompt", "seed", "nfe", "net_flops", "action_mask", "reward_score"):
            np.testing.assert_array_equal(ours[4][name], theirs[4][name])


def test_the_state_is_a_copy(small_kwargs: dict[str, Any]) -> None:
    env = make(small_kwargs)
    env.reset(seed=1)
    state = env.state_dict()
    before = state["latents"].clone(), state["nfe"].clone(), state["features"]["clip_score"].clone()
    env.step(np.array([0, 2, 1]))
    for old, new in zip(before, (state["latents"], state["nfe"], state["features"]["clip_score"]), strict=True):
        assert torch.equal(old, new)


def test_final_pictures_travel_too(small_kwargs: dict[str, Any]) -> None:
    first, second = (make(small_kwargs, 2, AutoresetMode.DISABLED) for _ in range(2))
    first.reset(seed=3)
    first.step(np.array([1, 0]))
    second.load_state_dict(first.state_dict())
    np.testing.assert_array_equal(second.final_image(0), first.final_image(0))
    with pytest.raises(RuntimeError, match="lane 1"):
        second.final_image(1)


def test_the_state_of_other_settings_is_refused(small_kwargs: dict[str, Any]) -> None:
    first = make(small_kwargs)
    first.reset(seed=3)
    with pytest.raises(ValueError, match=r"latents is \(3, .*\) there, \(2, "):
        make(small_kwargs, 2).load_state_dict(first.state_dict())


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, list):
        return all(same(*pair) for pair in zip(left, right, strict=True))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[name]) for name, value in left.items())
    return left == right


def test_every_field_of_the_lanes_is_saved_and_restored(small_kwargs: dict[str, Any]) -> None:
    """Each field on its own: changed in one environment, found again in the other."""
    first, second = (make(small_kwargs, 2, AutoresetMode.DISABLED) for _ in range(2))
    first.reset(seed=3)
    first.step(np.array([1, 2]))
    for name in [f.name for f in fields(LaneState) if f.metadata.get("saved", True)]:
        change(getattr(first.state, name))
        assert not same(second.state_dict()[name], first.state_dict()[name]), name
        second.load_state_dict(first.state_dict())
        assert same(second.state_dict()[name], first.state_dict()[name]), name


def change(value: Any) -> None:
    """Give every part another value, in place."""
    if is_dataclass(value):
        for part in vars(value).values():
            change(part)
    elif isinstance(value, torch.Tensor):
        value.copy_(1 - value.long())
    elif isinstance(value, np.ndarray):
        value[:] = 1 - value.astype(np.int64)
    elif isinstance(value[0], torch.Generator):
        value[0].manual_seed(77)
    elif any(isinstance(item, np.ndarray) for item in value):
        value.reverse()
    else:
        value[0] = "a cyan ring"


@pytest.mark.parametrize("spoil", ["format_version", "missing", "size", "lanes", "features", "stream", "end"])
def test_a_refused_state_changes_nothing(small_kwargs: dict[str, Any], spoil: str) -> None:
    env = make(small_kwargs, 2, AutoresetMode.DISABLED)
    env.reset(seed=3)
    state = env.state_dict()
    env.step(np.array([1, 0]))
    before = env.state_dict()
    if spoil == "format_version":  # states of earlier releases had none
        del state["format_version"]
    elif spoil == "missing":
        del state["refines"]
    elif spoil == "size":
        state["net_flops"] = state["net_flops"][:1]
    elif spoil == "lanes":
        state["generators"] = state["generators"][:1]
    elif spoil == "stream":  # as of the lanes alone
        del state["stream"]
    elif spoil == "end":  # as of a longer schedule: an index beyond this one's end
        state["step_index"][1] = env.config.num_inference_steps
    else:
        state["features"]["dino"] = state["features"]["dino"][:, :1]
    expected = {
        "format_version": "format_version None, this release reads 4",
        "missing": "the state has no refines",
        "size": r"net_flops is \(1,\) there, \(2,\) here",
        "lanes": r"generators is \(1,\) there, \(2,\) here",
        "features": r"features.dino is \(2, 1\) there",
        "stream": "the state has no stream",
        "end": r"have made \[\d+\] steps there, num_inference_steps is \d+ here",
    }
    with pytest.raises(ValueError, match=expected[spoil]):
        env.load_state_dict(state)
    assert same(env.state_dict(), before)


# ------------------------------------------------------------------ what others may do with it


def test_parked_lanes_wait_at_no_cost_until_they_are_named(small_kwargs: dict[str, Any]) -> None:
    env, alone = (make(small_kwargs, 3, AutoresetMode.DISABLED) for _ in range(2))
    for one in (env, alone):
        one.reset(seed=3)
    env.park([0, 2])
    before = env.net_flops.copy(), env.latents.clone()
    _, reward, terminated, _, info = env.step(np.zeros(3, int))
    alone.step(np.zeros(3, int))
    assert terminated.tolist() == [True, False, True] and info["action_taken"].tolist() == [-1, 0, -1]
    assert (env.net_flops == before[0]).tolist() == [True, False, True] and reward[[0, 2]].tolist() == [0, 0]
    assert torch.equal(env.latents[[0, 2]], before[1][[0, 2]]) and not torch.equal(env.latents[1], before[1][1])
    torch.testing.assert_close(env.latents[1], alone.latents[1], rtol=0, atol=1e-4)
    env.reset(options={"reset_mask": np.array([True, False, False])})
    assert env.done.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("lanes", "done"),
    [([], []), ([1], [1]), (np.array([2, 0]), [0, 2]), (np.array([False, True, False]), [1]), (torch.tensor([0]), [0])],
    ids=str,
)
def test_lanes_are_parked_by_number_or_mask(small_kwargs: dict[str, Any], lanes: Any, done: list[int]) -> None:
    env = make(small_kwargs, 3, AutoresetMode.DISABLED)
    env.reset(seed=3)
    env.park(lanes)
    assert np.flatnonzero(env.done).tolist() == done


@pytest.mark.parametrize("lanes", [[], np.zeros(3, bool)], ids=str)
def test_no_lanes_have_no_previews(small_kwargs: dict[str, Any], lanes: Any) -> None:
    env = make(small_kwargs)
    env.reset(seed=3)
    assert env.preview_images(lanes).shape == (0, 64, 64, 3)


@pytest.mark.parametrize("lane", [3, -1, 0.5])
def test_a_lane_that_there_is_not_has_no_picture(small_kwargs: dict[str, Any], lane: Any) -> None:
    env = make(small_kwargs)
    env.reset(seed=3)
    with pytest.raises(ValueError, match=re.escape(f"numbers below 3, or 3 booleans, got [{lane}]")):
        env.final_image(lane)


@pytest.mark.parametrize("lanes", [[3], [-1], [0.5], [True], [[0]], 1, "0", None, np.ones(4, bool)], ids=str)
def test_lanes_that_there_are_not_are_not_parked(small_kwargs: dict[str, Any], lanes: Any) -> None:
    env = make(small_kwargs, 3, AutoresetMode.DISABLED)
    env.reset(seed=3)
    with pytest.raises(ValueError, match="lanes must be numbers below 3"):
        env.park(lanes)
    assert not env.done.any()


def test_lanes_that_restart_by_themselves_cannot_be_parked(small_kwargs: dict[str, Any]) -> None:
    for mode in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
        with pytest.raises(ValueError, match="DISABLED"):
            make(small_kwargs, 2, mode).park([0])


def test_what_the_parts_hold_is_read_on_the_environment_and_not_set(small_kwargs: dict[str, Any]) -> None:
    env = make(small_kwargs, 2, AutoresetMode.DISABLED)
    env.reset(seed=3)
    for name in [f.name for f in fields(LaneState) if hasattr(type(env), f.name)]:
        assert getattr(env, name) is getattr(env.state, name)
        with pytest.raises(AttributeError, match=f"{name} belongs to the environment's state"):
            setattr(env, name, None)
    with pytest.raises(AttributeError, match="schedule belongs to the environment's denoiser"):
        env.schedule = None


def test_the_reward_may_be_set_between_steps(small_kwargs: dict[str, Any]) -> None:
    first, second = (make(small_kwargs, 2, AutoresetMode.DISABLED) for _ in range(2))
    for env in (first, second):
        env.reset(seed=3)
    second.set_reward(RewardConfig.from_dict({**vars(second.reward_config), "efficiency": 0.5}))
    parts = [env.step(np.zeros(2, int))[4]["reward_components"] for env in (first, second)]
    assert (parts[0]["efficiency"] != parts[1]["efficiency"]).all()
    np.testing.assert_array_equal(parts[0]["shaping"], parts[1]["shaping"])
