"""Bad input gives an error that shows the offending value; odd input works."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import addiff_env
from addiff_env.env import DiffusionDenoiseEnv, DiffusionDenoiseVectorEnv
from addiff_env.env.prompts import load_prompts
from addiff_env.loading.paths import resolve_model

ID = "AdDiffusion-Tiny-v0"
Kwargs = dict[str, Any]


@pytest.fixture(scope="module")
def env(small_kwargs: Kwargs) -> DiffusionDenoiseEnv:
    return gym.make(ID, **small_kwargs).unwrapped  # type: ignore[return-value]


@pytest.fixture(scope="module")
def envs(small_kwargs: Kwargs) -> DiffusionDenoiseVectorEnv:
    return gym.make_vec(ID, num_envs=2, **small_kwargs).unwrapped  # type: ignore[return-value]


# ------------------------------------------------------------------ prompts, seeds, latents


@pytest.mark.parametrize("prompt", [7, None, b"a star", ["a star"]])
def test_a_prompt_must_be_a_string(env: DiffusionDenoiseEnv, prompt: Any) -> None:
    with pytest.raises(TypeError, match="prompt must be a string") as error:
        env.reset(options={"prompt": prompt})
    assert repr(prompt) in str(error.value)


def test_prompts_of_a_vector_environment(envs: DiffusionDenoiseVectorEnv) -> None:
    with pytest.raises(TypeError, match="got int: 7"):
        envs.reset(options={"prompt": ["a star", 7]})
    with pytest.raises(ValueError, match=r"3 prompt values for 2 lanes: \['a', 'b', 'c'\]"):
        envs.reset(options={"prompt": ["a", "b", "c"]})
    with pytest.raises(TypeError, match="one prompt per lane, got 'a star'"):
        envs.reset(options={"prompt": "a star"})
    with pytest.raises(TypeError, match="one seed per lane, got 3"):
        envs.reset(options={"seed": 3})
    with pytest.raises(ValueError, match="1 seed values for 2 lanes"):
        envs.reset(options={"seed": [1]})
    with pytest.raises(ValueError, match="'promt'"):
        envs.reset(options={"promt": ["a", "b"]})


@pytest.mark.parametrize("seed", [-1, 1.5, "3", True, None, 2**63])
def test_bad_seeds_are_shown(env: DiffusionDenoiseEnv, envs: DiffusionDenoiseVectorEnv, seed: Any) -> None:
    with pytest.raises(ValueError, match="non-negative integer") as error:
        env.reset(options={"seed": seed})
    assert repr(seed) in str(error.value)
    with pytest.raises(ValueError, match="non-negative integer"):
        envs.reset(options={"seed": [0, seed]})


def test_latents_of_another_shape_are_shown(env: DiffusionDenoiseEnv) -> None:
    with pytest.raises(ValueError, match=r"\(4, 16, 16\).*got \(1, 3, 16, 16\)"):
        env.reset(options={"latents": torch.zeros(3, 16, 16)})


@pytest.mark.parametrize("latents", ["noise", None, [["a"], ["b"]]])
def test_latents_that_are_no_numbers_are_shown(
    env: DiffusionDenoiseEnv, envs: DiffusionDenoiseVectorEnv, latents: Any
) -> None:
    for made in (env, envs):
        with pytest.raises(TypeError, match="latents") as error:
            made.reset(options={"latents": latents})
        assert str(latents) in str(error.value)


def test_latents_may_be_given_in_any_form(envs: DiffusionDenoiseVectorEnv) -> None:
    noise = torch.randn(2, *envs.latent_shape, generator=torch.Generator().manual_seed(0))
    finals = []
    for latents in (noise, noise.double().numpy(), list(noise), noise.tolist()):
        envs.reset(options={"latents": latents, "prompt": ["a star"] * 2, "seed": torch.tensor([1, 2])})
        finals.append(envs.latents.clone())
    assert all(torch.equal(final, finals[0]) for final in finals)


def test_options_must_be_a_mapping(env: DiffusionDenoiseEnv, envs: DiffusionDenoiseVectorEnv) -> None:
    for made in (env, envs):
        with pytest.raises(TypeError, match=r"mapping, got \['seed'\]"):
            made.reset(options=["seed"])  # type: ignore[arg-type]


def test_a_refused_reset_leaves_the_episode_alone(env: DiffusionDenoiseEnv) -> None:
    env.reset(options={"prompt": "a star", "seed": 1})
    before = env.latents.clone()
    with pytest.raises(ValueError, match="-1"):
        env.reset(options={"prompt": "a ring", "seed": -1})
    assert torch.equal(env.latents, before) and env.vector.prompt == ["a star"]


def test_one_lane_may_defer_its_warm_up(env: DiffusionDenoiseEnv) -> None:
    _, info = env.reset(options={"prompt": "a star", "defer_warmup": True})
    assert info["nfe"] == 0
    with pytest.raises(ValueError, match="defer_warmup must be True or False, got 'yes'"):
        env.reset(options={"defer_warmup": "yes"})


def test_empty_prompt_works(env: DiffusionDenoiseEnv) -> None:
    observation, info = env.reset(options={"prompt": "", "seed": 0})  # any warning would be an error here
    assert info["prompt"] == "" and np.isfinite(observation).all()
    for action in (0, 2, 1):
        observation = env.step(action)[0]
        assert env.observation_space.contains(observation)


@pytest.mark.parametrize("word", ["zorgon", "hare", "ünïcödé"])
def test_unknown_words_are_named_once(env: DiffusionDenoiseEnv, word: str) -> None:
    with pytest.warns(UserWarning) as caught:
        env.reset(options={"prompt": f"a red {word} and a circle", "seed": 0})
    assert len(caught) == 1 and repr(word) in str(caught[0].message)
    assert env.observation_space.contains(env.step(2)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.reset(options={"prompt": f"a red {word} and a circle", "seed": 1})
        env.reset(options={"prompt": f"two blue {word}", "seed": 1})


def test_overlong_prompts_are_cut_and_said_once(env: DiffusionDenoiseEnv) -> None:
    prompt = "a red star and " * 12 + "a ring"
    with pytest.warns(UserWarning, match="truncated.*a ring") as caught:
        env.reset(options={"prompt": prompt, "seed": 0})
    assert len(caught) == 1
    _, info = env.reset(options={"prompt": prompt, "seed": 0})
    assert info["prompt"] == prompt


def test_prompt_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        load_prompts(str(tmp_path / "nowhere.txt"))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    with pytest.raises(ValueError, match=r"no prompts in .*empty\.txt"):
        load_prompts(str(empty))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a star"}\n{"text": "a ring"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: .*a ring"):
        load_prompts(str(rows))
    rows.write_text('{"prompt": "a star"}\n{"prompt": 3}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: .*got 3"):
        load_prompts(str(rows))
    rows.write_text('{"prompt": "a star"}\n\n{"prompt": "ein Stern für ü"}\n')
    assert load_prompts(str(rows)) == ["a star", "ein Stern für ü"]
    with pytest.raises(ValueError, match="no prompts in"):
        load_prompts([])


# ------------------------------------------------------------------ actions


@pytest.mark.parametrize("action", [3, -1, 1.5, "stop", None, True, [0]])
def test_bad_actions_are_shown(env: DiffusionDenoiseEnv, action: Any) -> None:
    env.reset(seed=0)
    before = env.latents.clone()
    with pytest.raises(ValueError, match="action") as error:
        env.step(action)
    assert str(action) in str(error.value)
    assert torch.equal(env.latents, before)


@pytest.mark.parametrize("action", [1, np.int64(1), np.array(1), torch.tensor(1)])
def test_every_integer_is_an_action(env: DiffusionDenoiseEnv, action: Any) -> None:
    env.reset(seed=0)
    assert env.step(action)[4]["action_taken"] == 1


@pytest.mark.parametrize("actions", [[0], [0, 0, 0], [[0, 0]], 0, [0, 3], [0, 1.5]])
def test_bad_action_arrays_are_shown(envs: DiffusionDenoiseVectorEnv, actions: Any) -> None:
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="actions") as error:
        envs.step(actions)
    assert str(actions) in str(error.value)


def test_reset_comes_first(small_kwargs: Kwargs) -> None:
    for made in (gym.make(ID, **small_kwargs), gym.make(ID, **small_kwargs).unwrapped):
        with pytest.raises(gym.error.ResetNeeded):
            made.step(0)
    envs = gym.make_vec(ID, num_envs=2, render_mode="rgb_array", **small_kwargs)
    with pytest.raises(gym.error.ResetNeeded, match=r"reset\(\) before step"):
        envs.step(np.array([0, 0]))
    with pytest.raises(gym.error.ResetNeeded, match=r"reset\(\) before render"):
        envs.render()


def test_an_ended_episode_needs_a_reset(env: DiffusionDenoiseEnv) -> None:
    env.reset(seed=0)
    assert env.step(1)[2]
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    env.reset()
    env.step(0)


# ------------------------------------------------------------------ settings


def test_unknown_arguments_are_named(small_kwargs: Kwargs) -> None:
    with pytest.raises(TypeError, match="'guidance'.*guidance_scale"):
        gym.make(ID, guidance=3, **small_kwargs)
    with pytest.raises(TypeError, match="'guidance'"):
        gym.make_vec(ID, num_envs=2, guidance=3, **small_kwargs)
    with pytest.raises(gym.error.NameNotFound, match="AdDiffusion-Nano"):
        gym.make("AdDiffusion-Nano-v0")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mask", "salience"),
        ("solver", "heun"),
        ("dtype", "float8"),
        ("refine_mode", "again"),
        ("obs_mode", "pixels"),
        ("obs_backend", "jax"),
        ("preview", "taesd"),
        ("render_mode", "ansi"),
        ("num_inference_steps", 0),
        ("num_inference_steps", 5000),
        ("num_inference_steps", 2.5),
        ("num_inference_steps", "10"),
        ("warmup_steps", -1),
        ("eta", -0.5),
        ("warmup_steps", 6),
        ("finish_steps", -1),
        ("max_nfe", 2),
        ("max_refines", -1),
        ("refine_k", 0),
        ("observe_every", 0),
        ("batch_size", 0),
        ("guidance_scale", -1.0),
        ("guidance_scale", float("nan")),
        ("blur_sigma", -0.5),
        ("mask_threshold", 1.5),
        ("mask_threshold", 0.0),
        ("renoise", 0),
        ("renoise", 1.2),
        ("renoise", "half"),
        ("renoise", "relative:2"),
        ("height", 30),
        ("attention_stride", 3),
        ("attention_stride", 16),
        ("reward", {"bonus": 1.0}),
        ("reward", {"terminal": float("nan")}),
        ("prompts", []),
        ("price_range", []),
        ("price_range", [0.004]),
        ("price_range", 0.004),
        ("price_range", "0.001,0.01"),
        ("price_range", [0.01, 0.001]),
        ("price_range", [0.0, 0.01]),
        ("price_range", [-0.001, 0.01]),
        ("price_range", [0.001, float("nan")]),
        ("price_range", [0.001, float("inf")]),
        ("price_range", [0.001, 0.01, 0.1]),
        ("price_range", [0.001, None]),
        ("price_range", ["0.001", "0.01"]),
        ("price_range", [True, True]),
    ],
)
def test_bad_settings_are_shown(small_kwargs: Kwargs, name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium's own remark about the render mode
        gym.make(ID, **{**small_kwargs, name: value})
    shown = next(iter(value)) if isinstance(value, dict) else value
    assert str(shown) in str(error.value) and name.split("_")[0] in str(error.value)


def test_no_lanes_are_refused(small_kwargs: Kwargs) -> None:
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        DiffusionDenoiseVectorEnv(num_envs=0, **{**addiff_env.TINY, **small_kwargs})


# ------------------------------------------------------------------ models


@pytest.mark.parametrize("name", ["model", "clip", "dino", "scorer"])
def test_missing_models_are_named(small_kwargs: Kwargs, tmp_path: Path, name: str) -> None:
    folder = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError) as error:
        gym.make(ID, **{**small_kwargs, name: folder})
    assert folder in str(error.value)


def test_missing_packaged_models_say_how_to_get_them(small_kwargs: Kwargs) -> None:
    with pytest.raises(FileNotFoundError, match="tiny/weights/gone.*addiff world train"):
        gym.make(ID, **{**small_kwargs, "model": "addiff_env:tiny/weights/gone"})


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("model", "unet/diffusion_pytorch_model.safetensors"),
        ("model", "vae/diffusion_pytorch_model.safetensors"),
        ("model", "text_encoder/model.safetensors"),
        ("clip", "model.safetensors"),
        ("dino", "model.safetensors"),
        ("scorer", "model.safetensors"),
    ],
)
def test_truncated_weights_name_their_folder(small_kwargs: Kwargs, tmp_path: Path, name: str, file: str) -> None:
    source = resolve_model({**addiff_env.TINY, **small_kwargs}[name])
    shutil.copytree(source, tmp_path / "cut")
    data = (tmp_path / "cut" / file).read_bytes()
    (tmp_path / "cut" / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError) as error:
        gym.make(ID, **{**small_kwargs, name: str(tmp_path / "cut")})
    assert str(tmp_path / "cut") in str(error.value)


def test_a_missing_weight_file_names_the_folder(small_kwargs: Kwargs, small_model: Path, tmp_path: Path) -> None:
    shutil.copytree(small_model, tmp_path / "cut")
    (tmp_path / "cut" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        gym.make(ID, **{**small_kwargs, "model": str(tmp_path / "cut")})
    assert str(tmp_path / "cut") in str(error.value)
