"""An environment's saved state: another one goes on from it exactly."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

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
    before = state["latents"].clone(), state["nfe"].clone(), state["seen"]["clip_score"].clone()
    env.step(np.array([0, 2, 1]))
    for old, new in zip(before, (state["latents"], state["nfe"], state["seen"]["clip_score"]), strict=True):
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
