"""What reinforcement learners do out of habit: masks, step limits, wrappers, writing into what they were handed."""

import copy
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics
from stable_baselines3.common.vec_env import DummyVecEnv
from torch.utils._pytree import tree_leaves

from addiff_env.env import DiffusionDenoiseVectorEnv
from addiff_env.env.reward import COLUMNS, COMPONENTS
from addiff_env.evaluation.methods.rule_policies import StopAt
from addiff_env.pipeline import AdaptivePipeline
from addiff_env.sb3 import make_vec_env

ID = "AdDiffusion-Tiny-v0"
CONTINUE, STOP, REFINE = range(3)
Kwargs = dict[str, Any]


def vector(kwargs: Kwargs, num_envs: int = 2, **more: Any) -> DiffusionDenoiseVectorEnv:
    envs = gym.make_vec(ID, num_envs=num_envs, **{**kwargs, **more}).unwrapped
    assert isinstance(envs, DiffusionDenoiseVectorEnv)
    return envs


def test_masks_are_what_spaces_sample_with(small_kwargs: Kwargs) -> None:
    kwargs = {**small_kwargs, "max_refines": 0}
    env, envs = gym.make(ID, **kwargs), vector(kwargs)
    _, info = env.reset(seed=0)
    assert {int(env.action_space.sample(info["action_mask"])) for _ in range(20)} == {CONTINUE, STOP}
    _, infos = envs.reset(seed=0)
    drawn = [envs.action_space.sample(tuple(infos["action_mask"])) for _ in range(20)]
    assert set(np.concatenate(drawn).tolist()) == {CONTINUE, STOP}
    assert envs.action_masks().dtype == bool


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_step_limits_cut_each_lane(small_kwargs: Kwargs, mode: AutoresetMode) -> None:
    envs = vector(small_kwargs, autoreset_mode=mode, max_episode_steps=np.int64(2))
    options = {"prompt": ["a star"] * 2, "seed": [1, 2]}
    envs.reset(options=options)
    _, _, terminated, truncated, _ = envs.step([CONTINUE, STOP])
    assert terminated.tolist() == [False, True] and truncated.tolist() == [False, False]
    _, reward, terminated, truncated, info = envs.step([CONTINUE, CONTINUE])
    assert truncated.tolist() == [True, False]
    assert not terminated[0]
    env = gym.make(ID, max_episode_steps=2, **small_kwargs)
    env.reset(options={"prompt": "a star", "seed": 1})
    env.step(CONTINUE)
    _, alone, *ends, _ = env.step(CONTINUE)
    assert ends == [False, True] and reward[0] == pytest.approx(alone, abs=1e-5)
    if mode == AutoresetMode.SAME_STEP:
        assert info["_final_info"][0] and info["step_index"][0] == 2  # the warm-up of the next episode
    elif mode == AutoresetMode.NEXT_STEP:
        _, reward, _, truncated, info = envs.step([CONTINUE, CONTINUE])
        assert reward[0] == 0 and not truncated[0] and info["action_taken"][0] == -1
    else:
        with pytest.raises(gym.error.ResetNeeded):
            envs.step([CONTINUE, CONTINUE])
        envs.reset(options={"reset_mask": [True, False]})
        assert not envs.step([CONTINUE, CONTINUE])[3][0]


def test_registered_step_limits_hold(small_kwargs: Kwargs) -> None:
    points = {"entry_point": "addiff_env.env:DiffusionDenoiseEnv"}
    points["vector_entry_point"] = "addiff_env.env:DiffusionDenoiseVectorEnv"
    gym.register("Limited-v0", max_episode_steps=1, kwargs=dict(gym.spec(ID).kwargs), **points)
    try:
        envs = gym.make_vec("Limited-v0", num_envs=2, **small_kwargs)
        envs.reset(seed=0)
        assert envs.step(np.zeros(2, int))[3].all()
        sb3 = make_vec_env("Limited-v0", 2, **small_kwargs)
        sb3.reset()
        _, _, dones, infos = sb3.step(np.zeros(2, int))
        assert dones.all() and all(info["TimeLimit.truncated"] for info in infos)
    finally:
        del gym.registry["Limited-v0"]


def test_components_are_arrays_with_names(small_kwargs: Kwargs) -> None:
    envs = vector(small_kwargs)
    envs.reset(seed=0)
    _, reward, _, _, info = envs.step([CONTINUE, STOP])
    components = info["reward_components"]
    assert components.shape == (2, len(COLUMNS)) and torch.from_numpy(np.asarray(components)).dtype == torch.float64
    np.testing.assert_allclose(sum(components[name] for name in COMPONENTS), reward)
    assert "reward" not in info


def test_info_lists_numbers_and_finds_the_prompt_by_its_name(small_kwargs: Kwargs) -> None:
    prompts = ["a star", "a ring"]
    envs = vector(small_kwargs, autoreset_mode=AutoresetMode.SAME_STEP)
    envs.reset(options={"prompt": prompts})
    *_, info = envs.step([CONTINUE, STOP])
    last = info["final_info"]
    assert all(value.dtype != object for kept in (info, last) for name, value in kept.items() if "final" not in name)
    assert last["prompt"].tolist() == prompts and last["_prompt"].tolist() == [False, True]
    assert info["prompt"][0] == "a star" and info["prompt"][1] in envs.prompts

    env = gym.make(ID, **small_kwargs)
    _, info = env.reset(options={"prompt": "a star"})
    for kept in (info, copy.deepcopy(info), pickle.loads(pickle.dumps(info)), info.copy(), info | {"more": 1}):
        assert kept["prompt"] == kept.get("prompt") == "a star" and "prompt" in kept and "prompt" not in list(kept)
    assert "other" not in info and info.get("other", 3) == 3
    with pytest.raises(KeyError, match="other"):
        info["other"]
    _, info = gym.make(ID, text_info=True, **small_kwargs).reset(options={"prompt": "a star"})
    assert dict(info)["prompt"] == "a star"


def test_all_of_info_becomes_tensors(small_kwargs: Kwargs) -> None:
    pytest.importorskip("array_api_compat")  # of Gymnasium's extra "torch"
    one = gym.wrappers.NumpyToTorch(gym.make(ID, **small_kwargs))
    many = [gym.make_vec(ID, num_envs=2, vectorization_mode=mode, **small_kwargs) for mode in (None, "sync")]
    for env, action in ((one, 0), *((gym.wrappers.vector.NumpyToTorch(envs), [0, 1]) for envs in many)):
        env.reset(seed=0)
        info = env.step(torch.tensor(action))[4]
        assert all(isinstance(value, torch.Tensor) for value in info.values())
    envs = vector(small_kwargs)
    leaves = tree_leaves(envs.reset(seed=0)[1])  # what TorchRL does
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype != object for leaf in leaves)


def broken(monkeypatch: pytest.MonkeyPatch, backbone: Any, lane: int | slice) -> None:
    """The model's answers for this lane are not finite."""
    predict = backbone.predict

    def spy(latents: torch.Tensor, *args: Any, **more: Any) -> Any:
        now = predict(latents, *args, **more)
        now.x0[lane] = torch.nan
        return now

    monkeypatch.setattr(backbone, "predict", spy)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("action", [CONTINUE, STOP, REFINE])
def test_the_first_step_ends_a_lane_that_broke_down_in_its_warm_up(
    small_kwargs: Kwargs, monkeypatch: pytest.MonkeyPatch, mode: AutoresetMode, action: int
) -> None:
    envs = vector(small_kwargs, autoreset_mode=mode)
    with monkeypatch.context() as patch:
        broken(patch, envs.backbone, 1)
        observation, info = envs.reset(seed=0)
    assert info["fault"].tolist() == [False, True] and envs.observation_space.contains(observation)
    observation, reward, terminated, truncated, info = envs.step([CONTINUE, action])
    assert terminated.tolist() == [False, True] and not truncated.any()
    last = info["final_info"] if mode == AutoresetMode.SAME_STEP else info
    assert last["reward_components"]["fault"].tolist() == [0, -1] and last["fault"][1] and last["action_taken"][1] == -1
    assert np.isfinite(reward).all() and envs.observation_space.contains(observation)
    if mode != AutoresetMode.SAME_STEP:
        assert envs.final_image(1).shape == (64, 64, 3)


def test_stable_baselines_and_the_pipeline_survive_it(small_kwargs: Kwargs, monkeypatch: pytest.MonkeyPatch) -> None:
    dummy = DummyVecEnv([lambda: gym.make(ID, **small_kwargs)])
    envs = vector(small_kwargs, autoreset_mode=AutoresetMode.DISABLED)
    ours = make_vec_env(ID, 2, **small_kwargs)
    ours.set_options([{"seed": 1}, {"seed": 2}])
    broken(monkeypatch, envs.backbone, slice(None))
    dummy.reset()
    _, reward, done, _ = dummy.step(np.array([CONTINUE]))
    assert done.all() and reward[0] <= -1
    ours.reset()  # named seeds are not drawn again
    made = AdaptivePipeline(envs, StopAt(4, 6))("a star", seeds=1)
    assert made.actions == [[]] and "finite" in made.notes[0] and made.images[0].size == (64, 64)


@pytest.mark.parametrize("size", [16, 24, 32, 48])
@pytest.mark.parametrize("stride", [2, 4])
def test_small_pictures_are_refused_or_finite(small_kwargs: Kwargs, size: int, stride: int) -> None:
    try:
        envs = vector(small_kwargs, 1, height=size, width=size, attention_stride=stride, blur_sigma=float(size))
    except ValueError as error:
        assert str(size) in str(error)  # noqa: PT017
        return
    observation, _ = envs.reset(options={"prompt": [""], "seed": [0]})
    for action in (REFINE, CONTINUE, STOP):
        assert np.isfinite(observation).all() and envs.observation_space.contains(observation)
        observation = envs.step([action])[0]
    assert np.isfinite(observation).all()


def deface(value: Any) -> None:
    """Write into every array."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple):
        for item in value:
            deface(item)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        value[...] = 1


@pytest.mark.parametrize("obs_mode", ["flat", "dict"])
def test_what_was_handed_out_is_the_callers(small_kwargs: Kwargs, obs_mode: str) -> None:
    kwargs = {**small_kwargs, "obs_mode": obs_mode, "render_mode": "rgb_array", "autoreset_mode": "DISABLED"}
    ours, clean = vector(kwargs), vector(kwargs)
    options = {"prompt": ["a star", "a ring"], "seed": np.array([1, 2])}
    deface(ours.reset(options=options))
    clean.reset(options=options)
    for actions in ([CONTINUE, REFINE], [STOP, CONTINUE]):
        taken = np.array(actions)
        got, expected = ours.step(taken), clean.step(actions)
        assert taken.tolist() == actions
        np.testing.assert_array_equal(got[1], expected[1])
        deface(got)
        deface(ours.render())
        deface(ours.action_masks())
    deface(ours.final_image(0))
    for one, other in zip(ours.render(), clean.render(), strict=True):  # type: ignore[arg-type]
        np.testing.assert_array_equal(one, other)


def test_gymnasiums_vector_wrappers(small_kwargs: Kwargs) -> None:
    wrapped = DictInfoToList(RecordEpisodeStatistics(vector(small_kwargs, autoreset_mode="SAME_STEP")))
    wrapped.reset(seed=0)
    assert wrapped.step(np.array([CONTINUE, STOP]))[4][0]["nfe"] == 3


def test_closing_twice(small_kwargs: Kwargs) -> None:
    for made in (gym.make(ID, **small_kwargs), gym.make_vec(ID, **small_kwargs)):
        made.close()
        made.close()
