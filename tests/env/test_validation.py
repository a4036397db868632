"""What users pass as settings, seeds and options is taken in every customary type, and refused where it is none."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from addiff_env import TINY
from addiff_env.agent import Agent, PolicyNet
from addiff_env.env import DiffusionDenoiseEnv, DiffusionDenoiseVectorEnv
from addiff_env.env.baseline_cache import compute_baselines
from addiff_env.env.config import EnvConfig
from addiff_env.env.prompts import load_prompts
from addiff_env.env.reward import RewardConfig
from addiff_env.env.validation import check_seed, plain
from addiff_env.pipeline import AdaptivePipeline, make_agent_env
from addiff_env.sb3 import PromptOrder

ID = "AdDiffusion-Tiny-v0"
Kwargs = dict[str, Any]
INTEGERS = [
    *("num_inference_steps", "height", "width", "warmup_steps", "finish_steps", "max_nfe", "max_refines", "refine_k"),
    *("observe_every", "batch_size", "attention_stride"),
]
FLOATS = ["eta", "guidance_scale", "mask_threshold", "blur_sigma"]
BOOLS = ["compile", "channels_last", "text_info"]
NEVER_NONE = [f.name for f in fields(EnvConfig) if "None" not in str(f.type)]
NO_SEEDS = [True, False, "3", 2.5, 3.0, -1, 2**63, 2**200, None, [3], b"3", np.nan, np.array([1]), np.bool_(True)]


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize("kind", [np.float32, np.int64, torch.Tensor, np.ndarray, int, str])
@pytest.mark.parametrize("name", ["height", "guidance_scale", "dtype", "compile", "reads", "reward", "prompts"])
def test_types_are_no_values(name: str, kind: type) -> None:
    assert plain(kind) is kind
    with pytest.raises((TypeError, ValueError), match=kind.__name__):
        DiffusionDenoiseEnv(**{**TINY, name: kind})


def test_prompts_without_an_order_are_refused() -> None:
    with pytest.raises(TypeError, match="set"):
        load_prompts({"a star", "a ring"})


@pytest.mark.parametrize(
    ("name", "given_value", "stored"),
    [
        ("model", Path("some/folder"), "some/folder"),
        ("lora", Path("some.safetensors"), "some.safetensors"),
        ("prompts", Path("prompts.txt"), "prompts.txt"),
        ("prompts", np.array(["a star", "a ring"]), ["a star", "a ring"]),
        ("prompts", ("a star",), ["a star"]),
        ("device", torch.device("cpu"), "cpu"),
        ("device", torch.device("cuda", 1), "cuda:1"),
        ("dtype", torch.bfloat16, "bfloat16"),
        ("height", np.int64(32), 32),
        ("width", np.array(32), 32),
        ("max_nfe", torch.tensor(20), 20),
        ("guidance_scale", np.float32(2.5), 2.5),
        ("guidance_scale", 3, 3),
        ("mask_threshold", np.float64(0.25), 0.25),
        ("compile", np.bool_(False), False),
        ("renoise", np.float64(0.5), 0.5),
        ("solver", np.str_("euler"), "euler"),
        ("reward", OmegaConf.create({"efficiency": 0.5}), {"efficiency": 0.5}),
        ("reward", {"clip_mean": np.float64(0.5)}, {"clip_mean": 0.5}),
    ],
)
def test_settings_are_stored_as_json_has_them(name: str, given_value: Any, stored: Any) -> None:
    config = EnvConfig(**{**TINY, name: given_value})
    value = getattr(config, name)
    assert value == stored and type(value) is type(stored)
    json.dumps(vars(config))


@given(data=st.data())
def test_values_of_another_type_are_refused_by_name(data: st.DataObject) -> None:
    words = st.sampled_from(["64", "true", "", "nan"])
    others = {
        **dict.fromkeys(
            INTEGERS, [words, st.booleans(), st.floats(), st.just([8]), st.just(np.float32(8)), st.binary()]
        ),
        **dict.fromkeys(FLOATS, [words, st.booleans(), st.sampled_from([np.nan, np.inf, -np.inf, 10**400, 1j])]),
        **dict.fromkeys(BOOLS, [words, st.integers(), st.floats(), st.none()]),
        **dict.fromkeys(NEVER_NONE, [st.none()]),
        **dict.fromkeys(
            ("model", "device", "solver", "clip"), [st.integers(), st.booleans(), st.just(["x"]), st.none()]
        ),
        "reward": [words, st.integers(), st.just([1])],
    }
    name = data.draw(st.sampled_from(sorted(others)))
    value = data.draw(st.one_of(others[name]))
    with pytest.raises(ValueError, match=name) as error:
        EnvConfig(**{**TINY, name: value})
    assert repr(value)[:50] in str(error.value)


@given(st.sampled_from(["height", "width"]), st.integers(-64, 1000))
def test_sizes_are_positive_multiples_of_eight(name: str, size: int) -> None:
    if size > 0 and size % 8 == 0:
        assert getattr(EnvConfig(**{**TINY, name: size}), name) == size
        return
    with pytest.raises(ValueError, match=f"{name}.*{size}"):
        EnvConfig(**{**TINY, name: size})


@pytest.mark.parametrize(
    ("name", "value"), [("height", "64"), ("num_inference_steps", True), ("warmup_steps", False), ("blur_sigma", 1e300)]
)
def test_settings_are_refused_before_a_model_is_looked_for(tmp_path: Path, name: str, value: Any) -> None:
    for make in (gym.make, gym.make_vec):
        with pytest.raises(ValueError, match=name):
            make(ID, model=tmp_path / "nowhere", **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_envs", value) for value in ("2", 2.0, True, 0, None)),
        *(("autoreset_mode", value) for value in ("sometimes", 3, None, np.array([1, 2]))),
        *(("max_episode_steps", value) for value in (0, -2, "5", 5.0, True, np.array([1, 2]))),
    ],
)
def test_a_vector_environments_own_settings(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        DiffusionDenoiseVectorEnv(**{**TINY, "model": tmp_path / "nowhere", name: value})


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, "SameStep", "SAME_STEP"])
def test_specs_are_json_whatever_they_were_given(small_kwargs: Kwargs, mode: Any) -> None:
    odd = {
        "model": Path(small_kwargs["model"]),
        "device": torch.device("cpu"),
        "num_inference_steps": np.int64(6),
        "guidance_scale": np.float32(4),
        "reward": OmegaConf.create({"efficiency": 0.5}),
        "prompts": np.array(["a star", "a ring"]),
    }
    envs = gym.make_vec(ID, num_envs=np.int64(2), autoreset_mode=mode, **{**small_kwargs, **odd})
    again = gym.make_vec(gym.envs.registration.EnvSpec.from_json(envs.spec.to_json()))  # type: ignore[union-attr]
    assert isinstance(again.unwrapped, DiffusionDenoiseVectorEnv) and again.num_envs == 2
    assert again.unwrapped.config == envs.unwrapped.config  # type: ignore[attr-defined]
    assert again.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    env = gym.make(ID, max_episode_steps=3, **{**small_kwargs, **odd})
    single = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json())).unwrapped  # type: ignore[union-attr]
    assert isinstance(single, DiffusionDenoiseEnv)
    assert single.config == env.unwrapped.config  # type: ignore[attr-defined]


def test_rewards_take_containers_and_refuse_the_rest() -> None:
    weights = {"efficiency": np.float32(0.5), "gamma": np.int64(1)}
    assert RewardConfig.from_dict(OmegaConf.create({"efficiency": 0.5})).efficiency == 0.5
    assert type(RewardConfig.from_dict(weights).efficiency) is float
    for value in ("high", [1], 3):
        with pytest.raises(ValueError, match="reward"):
            RewardConfig.from_dict(value)  # type: ignore[arg-type]


@given(
    st.recursive(
        st.one_of(st.integers(-5, 5), st.booleans(), st.text(max_size=3), st.none(), st.floats(allow_nan=False)),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=3)),
        max_leaves=8,
    )
)
def test_what_json_holds_stays_as_it_is(value: Any) -> None:
    assert plain(value) == value == json.loads(json.dumps(plain(value)))


# ------------------------------------------------------------------ seeds


@pytest.fixture(scope="module")
def env(small_kwargs: Kwargs) -> DiffusionDenoiseEnv:
    return gym.make(ID, **small_kwargs).unwrapped  # type: ignore[return-value]


@pytest.fixture(scope="module")
def envs(small_kwargs: Kwargs) -> DiffusionDenoiseVectorEnv:
    return gym.make_vec(ID, num_envs=2, **small_kwargs).unwrapped  # type: ignore[return-value]


@given(st.integers(0, 2**63 - 1))
def test_every_integer_type_is_a_seed(seed: int) -> None:
    forms = [seed, np.uint64(seed), np.int64(seed), np.array(seed), torch.tensor(seed)]
    assert [check_seed(form) for form in forms] == [seed] * len(forms)
    assert all(type(check_seed(form)) is int for form in forms)


@pytest.mark.parametrize("seed", NO_SEEDS, ids=repr)
def test_nonsense_is_no_seed_of_a_reset(env: Any, envs: Any, seed: Any) -> None:
    """None draws one where nothing else is said; a list of a vector environment is one seed per lane."""
    order = PromptOrder(["a star"])
    if seed is not None:
        for reset in (env.reset, envs.reset):
            with pytest.raises(ValueError, match="seed"):
                reset(seed=seed)
        with pytest.raises(ValueError, match="seed"):
            order.seed(seed)
        with pytest.raises(ValueError, match="seed"):
            envs.reset(seed=[0, seed])
    with pytest.raises(ValueError, match="seed"):
        env.reset(options={"seed": seed})
    with pytest.raises(ValueError, match="seed"):
        envs.reset(options={"seed": [0, seed]})


def test_a_refused_reset_leaves_the_random_stream_alone(env: Any, envs: Any) -> None:
    for made in (env, envs):
        made.reset(seed=3)
        before = made.np_random.bit_generator.state
        with pytest.raises((ValueError, TypeError)):
            made.reset(seed=4, options={"prompt": 7})
        assert made.np_random.bit_generator.state == before


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor])
def test_options_of_a_vector_environment_in_any_form(envs: Any, form: Any) -> None:
    prompts = ["a star", "a ring"] if form is torch.tensor else form(["a star", "a ring"])
    latents = form([np.full(envs.latent_shape, k / 10).tolist() for k in range(2)])
    options = {"prompt": prompts, "seed": form([3, 4]), "latents": latents, "reset_mask": form([True, True])}
    _, info = envs.reset(seed=form([5, 6]), options=options)
    assert info["prompt"].tolist() == ["a star", "a ring"] and info["seed"].tolist() == [3, 4]
    assert all(type(prompt) is str for prompt in map(str, info["prompt"]))


def test_seeds_of_single_and_vector_environments_agree(env: Any, envs: Any) -> None:
    _, info = envs.reset(seed=np.array([5, 6]))
    for lane, seed in enumerate([np.int64(5), torch.tensor(6)]):
        assert env.reset(seed=seed)[1]["seed"] == info["seed"][lane]


@pytest.mark.parametrize("actions", [[0.0, 1.0], [True, False], [None, 0], [[0], [1, 2]], ["0", "1"], None, [0, 2**70]])
def test_actions_of_another_kind_are_refused(envs: Any, actions: Any) -> None:
    envs.reset(seed=0)
    for form in (actions, np.array(actions, dtype=object), tuple(actions) if actions else actions):
        with pytest.raises(ValueError, match="actions"):
            envs.step(form)


# ------------------------------------------------------------------ pipeline and agent


@pytest.fixture(scope="module")
def agent(small_kwargs: Kwargs, env: Any) -> Agent:
    parts = env.vector.perception.parts
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = PolicyNet(parts, 8)
    return Agent(net, {"env": {"id": ID, "kwargs": small_kwargs}, "hidden": 8, "observation": parts})


def test_pipelines_take_seeds_in_any_form(agent: Agent) -> None:
    pipeline = AdaptivePipeline(make_agent_env(agent, 2, max_nfe=3), agent)
    for seeds in (np.int64(3), np.array(3), torch.tensor([3]), iter([3]), (3,), range(3, 4)):
        (seed,) = pipeline("a star", seeds=seeds).seeds
        assert seed == 3 and type(seed) is int
    many = pipeline((f"a {word}" for word in ("star", "ring")), seeds=np.random.default_rng(0))
    assert many.prompts == ["a star", "a ring"]
    assert pipeline(np.array(["a star", "a ring"]), seeds=np.arange(2)).prompts == ["a star", "a ring"]
    assert pipeline([], seeds=[]).images == []
    for seeds in (True, "3", 2.5, -1, [None], 2**63):
        with pytest.raises(ValueError, match="seed"):
            pipeline("a star", seeds=seeds)
    with pytest.raises(ValueError, match="2 prompts but 1 seeds"):
        pipeline(["a star", "a ring"], seeds=3)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_pipelines_act_on_dictionaries_as_on_flat_observations(agent: Agent, backend: str) -> None:
    results = []
    for mode in ("flat", "dict"):
        pipeline = AdaptivePipeline(make_agent_env(agent, 2, obs_mode=mode, obs_backend=backend), agent)
        made = pipeline(["a star", "a ring"], seeds=[1, 2])
        results.append((made.actions, made.nfe))
    assert results[0] == results[1]
    with pytest.raises(ValueError, match="no clip_text"):
        agent.act({"clip_image": np.zeros((1, 4))})


def test_agents_keep_settings_of_any_type(agent: Agent, tmp_path: Path) -> None:
    env = {"id": ID, "kwargs": {**agent.config["env"]["kwargs"], "model": Path("a"), "max_nfe": np.int64(9)}}
    Agent(agent.policy, agent.config | {"env": env}).save(tmp_path)
    assert Agent.load(tmp_path).environment[1]["model"] == "a"


def test_baselines_take_seeds_in_any_form(small_kwargs: Kwargs, tmp_path: Path) -> None:
    lanes = gym.make_vec(ID, num_envs=1, **small_kwargs).unwrapped
    assert isinstance(lanes, DiffusionDenoiseVectorEnv)
    path = tmp_path / "b.jsonl"
    cache = compute_baselines(path, lanes, np.int64(2), np.array(["a star"]), np.arange(2))  # type: ignore[arg-type]
    assert cache.seeds("a star") == [0, 1]
    assert compute_baselines(path, lanes, 2, ("a star",), (0, 1)).scores == cache.scores
    for steps, seeds in ((True, [0]), (0, [0]), (2, [True]), (2, [-1]), (2, ["0"])):
        with pytest.raises(ValueError, match="steps|seed"):
            compute_baselines(tmp_path / "other.jsonl", lanes, steps, ["a star"], seeds)  # type: ignore[arg-type]
    assert not (tmp_path / "other.jsonl").exists()
