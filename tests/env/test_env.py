"""The environment's dynamics against diffusers' pipeline, against itself lane by lane, and against the API."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rounding import assert_same_but_for_rounding
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from waits import Calls, Waits

from addiff_env.diffusion.attention import MASKS
from addiff_env.env import DiffusionDenoiseEnv, DiffusionDenoiseVectorEnv
from addiff_env.env.prices import position
from addiff_env.env.reward import COMPONENTS, quality

ID = "AdDiffusion-Tiny-v0"
CONTINUE, STOP, REFINE = range(3)
PROMPTS = ["a red circle", "two blue squares", "a star above a green ring", "a pink cross and a large circle"]
SEEDS = [11, 12, 13, 14]
Kwargs = dict[str, Any]


def vector(kwargs: Kwargs, num_envs: int = 2, mode: AutoresetMode = AutoresetMode.DISABLED, **more: Any):  # type: ignore[no-untyped-def]
    envs = gym.make_vec(ID, num_envs=num_envs, autoreset_mode=mode, **{**kwargs, **more}).unwrapped
    assert isinstance(envs, DiffusionDenoiseVectorEnv)
    return envs


def single(kwargs: Kwargs, **more: Any) -> DiffusionDenoiseEnv:
    env = gym.make(ID, **{**kwargs, **more}).unwrapped
    assert isinstance(env, DiffusionDenoiseEnv)
    return env


def start(envs: DiffusionDenoiseVectorEnv) -> tuple[Any, dict[str, Any]]:
    n = envs.num_envs
    return envs.reset(options={"prompt": PROMPTS[:n], "seed": SEEDS[:n]})


def scheduler_of(envs: DiffusionDenoiseVectorEnv) -> DDIMScheduler:
    scheduler = DDIMScheduler.from_config(envs.backbone.scheduler_config)
    scheduler.set_timesteps(envs.config.num_inference_steps)
    return scheduler


def pipeline_of(envs: DiffusionDenoiseVectorEnv) -> StableDiffusionPipeline:
    b = envs.backbone
    pipeline = StableDiffusionPipeline(
        b.vae, b.text_encoder, b.tokenizer, b.unet, scheduler_of(envs), None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def next_noise(envs: DiffusionDenoiseVectorEnv, lane: int = 0) -> torch.Tensor:
    """The noise (1, C, h, w) that the lane will draw next, without drawing it."""
    copy = torch.Generator()
    copy.set_state(envs.generators[lane].get_state())
    return torch.randn(1, *envs.latent_shape, generator=copy)


def close(a: torch.Tensor, b: torch.Tensor, share: float = 1e-4) -> None:
    assert_same_but_for_rounding(a, b, share)


# ------------------------------------------------------------------ conformance


def test_gymnasium_check(small_kwargs: Kwargs) -> None:
    check_env(gym.make(ID, render_mode="rgb_array", **small_kwargs).unwrapped)


@pytest.mark.parametrize("obs_mode", ["flat", "dict"])
def test_sb3_check(small_kwargs: Kwargs, obs_mode: str) -> None:
    sb3_check_env(single(small_kwargs, obs_mode=obs_mode))


def test_spec_survives_json(small_kwargs: Kwargs) -> None:
    plain = gym.spec(ID)
    assert gym.envs.registration.EnvSpec.from_json(plain.to_json()) == plain
    assert pickle.loads(pickle.dumps(plain)) == plain
    spec = gym.make(ID, **small_kwargs, mask="grid", reward={"efficiency": 0.02}).spec
    assert spec is not None
    again = gym.make(gym.envs.registration.EnvSpec.from_json(spec.to_json())).unwrapped
    assert isinstance(again, DiffusionDenoiseEnv)
    assert again.config.mask == "grid" and again.vector.reward_config.efficiency == 0.02
    assert again.config.num_inference_steps == 6


def test_make_vec_gives_the_batched_environment(small_kwargs: Kwargs) -> None:
    envs = gym.make_vec(ID, num_envs=3, **small_kwargs)
    assert isinstance(envs.unwrapped, DiffusionDenoiseVectorEnv)
    assert envs.num_envs == 3 and envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    observation, info = envs.reset(seed=1)
    assert envs.observation_space.contains(observation)
    assert envs.unwrapped.backbone is single(small_kwargs).vector.backbone  # one copy of the weights
    envs.close()


def test_models_are_frozen(small_kwargs: Kwargs) -> None:
    b = vector(small_kwargs).backbone
    for part in (b.unet, b.vae, b.text_encoder):
        assert not part.training and not any(p.requires_grad for p in part.parameters())


@pytest.mark.parametrize("obs_mode", ["flat", "dict"])
def test_observations_lie_in_their_space(small_kwargs: Kwargs, obs_mode: str) -> None:
    envs = vector(small_kwargs, 3, AutoresetMode.NEXT_STEP, obs_mode=obs_mode)
    observation, _ = envs.reset(seed=0)
    actions = np.random.default_rng(0)
    for _ in range(12):
        assert envs.observation_space.contains(observation)
        observation, reward, terminated, truncated, info = envs.step(actions.choice(3, size=3, p=[0.6, 0.2, 0.2]))
        assert reward.shape == (3,) and reward.dtype == np.float64 and np.isfinite(reward).all()
        assert terminated.dtype == truncated.dtype == bool and not truncated.any()
    if obs_mode == "dict":
        assert set(observation) == {"clip_image", "clip_text", "timestep", "quality", "dino", "unet"}


def test_flat_observation_is_the_parts_in_order(small_kwargs: Kwargs) -> None:
    flat, parts = (start(vector(small_kwargs, obs_mode=mode))[0] for mode in ("flat", "dict"))
    names = ("clip_image", "clip_text", "timestep", "quality")
    np.testing.assert_array_equal(flat, np.concatenate([parts[name] for name in names], axis=1))
    for name in ("clip_image", "clip_text", "dino"):
        np.testing.assert_allclose(np.linalg.norm(parts[name], axis=1), 1, atol=1e-5)
    score = (parts["clip_image"] * parts["clip_text"]).sum(1)
    np.testing.assert_allclose(parts["quality"][:, 0], score, atol=1e-5)
    np.testing.assert_allclose(parts["quality"][:, 5], 2 / 6)
    np.testing.assert_allclose(parts["quality"][:, 6], 2 / 12)


def test_torch_observations_stay_on_the_device(small_kwargs: Kwargs) -> None:
    envs, reference = vector(small_kwargs, obs_backend="torch"), vector(small_kwargs)
    ours, theirs = start(envs)[0], start(reference)[0]
    assert isinstance(ours, torch.Tensor) and ours.device == envs.latents.device
    np.testing.assert_array_equal(ours.numpy(), theirs)
    following = envs.step(torch.tensor([0, 0]))[0]
    assert not torch.equal(ours, following)  # the first was not overwritten
    parts = vector(small_kwargs, obs_backend="torch", obs_mode="dict")
    assert all(isinstance(value, torch.Tensor) for value in start(parts)[0].values())


def test_rendering(small_kwargs: Kwargs) -> None:
    assert vector(small_kwargs).render() is None
    envs = vector(small_kwargs, 2, render_mode="rgb_array")
    start(envs)
    envs.step(np.array([STOP, REFINE]))
    pictures = envs.render()
    assert len(pictures) == 2 and all(p.shape == (64, 64, 3) and p.dtype == np.uint8 for p in pictures)
    np.testing.assert_array_equal(pictures[0], envs.final_image(0))
    np.testing.assert_array_equal(pictures[1], envs.preview_images()[1])
    assert envs.refine_mask.shape == (2, 16, 16) and envs.refine_mask.dtype == np.float32
    assert envs.refine_mask[0].max() == 0 and 0 < envs.refine_mask[1].max() <= 1
    with pytest.raises(RuntimeError, match="lane 1 has not ended"):
        envs.final_image(1)
    envs.reset(options={"reset_mask": np.array([False, True])})
    assert envs.refine_mask.max() == 0  # no mask is left over from the episode before
    env = single(small_kwargs, render_mode="rgb_array")
    env.reset(seed=0)
    assert env.render().shape == (64, 64, 3)


# ------------------------------------------------------------------ parity with diffusers


def all_continue(envs: DiffusionDenoiseVectorEnv) -> None:
    start(envs)
    while not envs.done.all():
        envs.step(np.full(envs.num_envs, CONTINUE))


def assert_parity(envs: DiffusionDenoiseVectorEnv, prompt: str, seed: int, share: float = 1e-5) -> None:
    all_continue(envs)
    pipeline, c = pipeline_of(envs), envs.config
    expected = pipeline(
        prompt,
        num_inference_steps=c.num_inference_steps,
        guidance_scale=c.guidance_scale,
        height=c.height,
        width=c.width,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images
    close(envs.latents, expected, share)
    with torch.no_grad():
        decoded = pipeline.vae.decode(expected / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    picture = np.array(pipeline.image_processor.postprocess(decoded, output_type="pil")[0])
    assert np.abs(envs.final_image(0).astype(int) - picture).max() <= 1
    assert envs.nfe.tolist() == [c.num_inference_steps]


@pytest.mark.parametrize("number", [1, 4, 10, pytest.param(50, marks=pytest.mark.slow)])
def test_continuing_is_diffusers_pipeline(tiny_kwargs: Kwargs, number: int) -> None:
    more = {"num_inference_steps": number, "warmup_steps": min(3, number - 1), "max_nfe": 2 * number}
    envs = vector({**tiny_kwargs, "dtype": "float32"}, 1, observe_every=100, **more)
    assert_parity(envs, PROMPTS[0], SEEDS[0], share=1e-4)  # of latents; the pictures agree to a level


@pytest.mark.parametrize("scale", [1.0, 6.0])
@pytest.mark.parametrize("number", [1, 4, 10, 50])
def test_continuing_is_diffusers_pipeline_small(small_kwargs: Kwargs, number: int, scale: float) -> None:
    more = {"num_inference_steps": number, "guidance_scale": scale, "observe_every": 10, "max_nfe": 2 * number}
    more |= {"warmup_steps": min(2, number - 1)}
    assert_parity(vector(small_kwargs, 1, **more), PROMPTS[0], SEEDS[0])


def test_a_mask_that_was_handed_out_survives_the_next_reset(small_kwargs: Kwargs) -> None:
    envs = vector(small_kwargs, 1, mask="full")
    start(envs)
    envs.step(np.array([REFINE]))
    mask = envs.refine_mask
    start(envs)
    assert (mask == 1).all() and (envs.refine_mask == 0).all()


def test_given_latents_are_the_pipelines(small_kwargs: Kwargs) -> None:
    env = single(small_kwargs)
    noise = torch.randn(1, *env.vector.latent_shape, generator=torch.Generator().manual_seed(5))
    finals = []
    for latents in (noise, noise[0], noise.numpy()):
        env.reset(options={"prompt": PROMPTS[1], "seed": 0, "latents": latents})
        while not env.step(CONTINUE)[2]:
            pass
        finals.append(env.latents.clone())
    settings = {"guidance_scale": env.config.guidance_scale, "height": 64, "width": 64, "output_type": "latent"}
    expected = pipeline_of(env.vector)(PROMPTS[1], num_inference_steps=6, latents=noise, **settings).images
    assert torch.equal(finals[0], finals[1]) and torch.equal(finals[0], finals[2])
    close(finals[0], expected)


# ------------------------------------------------------------------ lanes


def run_alone(env: DiffusionDenoiseEnv, prompt: str, seed: int, actions: list[int]) -> dict[str, Any]:
    env.reset(options={"prompt": prompt, "seed": seed})
    rewards, info, terminated = [], {}, False
    for action in actions:
        _, reward, terminated, _, info = env.step(action)
        rewards.append(reward)
        if terminated:
            break
    return {"rewards": rewards, "nfe": info["nfe"], "latents": env.latents.clone(), "terminated": terminated}


@pytest.mark.parametrize("mode", ["rewind", "in_place"])
@pytest.mark.parametrize("mask", ["neglected_token", "unattended", "random"])
def test_lanes_equal_single_runs_in_any_order(small_kwargs: Kwargs, mode: str, mask: str) -> None:
    kwargs = {**small_kwargs, "refine_mode": mode, "mask": mask, "finish_steps": 2, "max_nfe": 14, "batch_size": 3}
    env = single(kwargs)
    rng = np.random.default_rng(2)
    plans = [rng.choice(3, size=12, p=[0.6, 0.05, 0.35]).tolist() for _ in range(4)]
    alone = [run_alone(env, p, s, plan) for p, s, plan in zip(PROMPTS, SEEDS, plans, strict=True)]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        envs = vector(kwargs, 4)
        envs.reset(options={"prompt": [PROMPTS[i] for i in order], "seed": [SEEDS[i] for i in order]})
        rewards: list[list[float]] = [[], [], [], []]
        for step in range(12):
            running = ~envs.done
            if not running.any():
                break
            _, reward, _, _, _ = envs.step(np.array([plans[i][step] for i in order]))
            for lane in np.flatnonzero(running):
                rewards[lane].append(reward[lane])
        for lane, i in enumerate(order):
            assert envs.nfe[lane] == alone[i]["nfe"]
            close(envs.latents[lane : lane + 1], alone[i]["latents"])
            np.testing.assert_allclose(rewards[lane], alone[i]["rewards"], atol=1e-4)


def finished_episodes(envs: DiffusionDenoiseVectorEnv, steps: int) -> list[dict[str, Any]]:
    """Drive lanes at random, restarting as their autoreset mode does; the episodes that ended."""
    rng, finished = np.random.default_rng(4), []
    _, info = envs.reset(seed=3)

    def fresh(info: dict[str, Any], lane: int) -> dict[str, Any]:
        return {"prompt": info["prompt"][lane], "seed": int(info["seed"][lane]), "actions": [], "rewards": []}

    episodes = [fresh(info, lane) for lane in range(envs.num_envs)]
    for _ in range(steps):
        actions, waiting = rng.choice(3, size=envs.num_envs, p=[0.5, 0.15, 0.35]), envs.done.copy()
        _, reward, terminated, _, info = envs.step(actions)
        for lane in range(envs.num_envs):
            if waiting[lane]:  # NEXT_STEP: this step was its reset
                assert reward[lane] == 0 and not terminated[lane] and info["action_taken"][lane] == -1
                assert info["nfe"][lane] == envs.config.warmup_steps
                episodes[lane] = fresh(info, lane)
                continue
            episodes[lane]["actions"].append(int(actions[lane]))
            episodes[lane]["rewards"].append(reward[lane])
            if terminated[lane]:
                last = info["final_info"] if envs.autoreset_mode == AutoresetMode.SAME_STEP else info
                finished.append(episodes[lane] | {"nfe": last["nfe"][lane], "prompt_seen": last["prompt"][lane]})
                episodes[lane] = fresh(info, lane)
        if envs.autoreset_mode == AutoresetMode.DISABLED and envs.done.any():
            ended = envs.done.copy()
            _, info = envs.reset(options={"reset_mask": ended})
            for lane in np.flatnonzero(ended):
                episodes[lane] = fresh(info, lane)
    return finished


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_episodes_equal_single_runs_under_autoreset(small_kwargs: Kwargs, mode: AutoresetMode) -> None:
    finished = finished_episodes(vector(small_kwargs, 3, mode), 14)
    assert len(finished) >= 6
    env = single(small_kwargs)
    for episode in finished:
        assert episode["prompt_seen"] == episode["prompt"]
        alone = run_alone(env, episode["prompt"], episode["seed"], episode["actions"])
        assert alone["terminated"] and alone["nfe"] == episode["nfe"]
        np.testing.assert_allclose(alone["rewards"], episode["rewards"], atol=1e-4)


def test_same_step_hands_over_the_last_observation(small_kwargs: Kwargs) -> None:
    envs, plain = (vector(small_kwargs, mode=mode) for mode in (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED))
    start(envs), start(plain)
    observation, reward, terminated, _, info = envs.step(np.array([STOP, CONTINUE]))
    last, last_reward, _, _, last_info = plain.step(np.array([STOP, CONTINUE]))
    assert terminated.tolist() == [True, False] and info["_final_obs"].tolist() == [True, False]
    np.testing.assert_allclose(info["final_obs"][0], last[0], atol=1e-5)
    assert info["final_obs"][1] is None
    np.testing.assert_allclose(observation[1], last[1], atol=1e-5)
    assert not np.allclose(observation[0], last[0])
    np.testing.assert_allclose(reward, last_reward, atol=1e-6)
    assert info["final_info"]["nfe"][0] == last_info["nfe"][0] == 2 and info["final_info"]["prompt"][0] == PROMPTS[0]
    np.testing.assert_allclose(info["final_info"]["net_flops"][0], last_info["net_flops"][0])


def test_waiting_lanes_cost_nothing(small_kwargs: Kwargs, monkeypatch: pytest.MonkeyPatch) -> None:
    envs = vector(small_kwargs, 3)
    start(envs)
    _, _, terminated, _, ended = envs.step(np.array([STOP, CONTINUE, CONTINUE]))
    sizes, predict = [], envs.backbone.predict

    def spy(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(latents))
        return predict(latents, *args, **kwargs)

    monkeypatch.setattr(envs.backbone, "predict", spy)
    picture = envs.final_image(0)
    _, reward, terminated, _, info = envs.step(np.array([REFINE, CONTINUE, STOP]))
    assert sizes == [1] and reward[0] == 0 and terminated.tolist() == [True, False, True]
    assert info["nfe"][0] == ended["nfe"][0] and info["net_flops"][0] == ended["net_flops"][0]
    assert info["action_taken"].tolist() == [-1, CONTINUE, STOP]
    before = envs.latents[1:].clone()
    _, info = envs.reset(options={"reset_mask": np.array([True, False, False]), "prompt": ["a ring"], "seed": [3]})
    assert info["prompt"].tolist() == ["a ring", *PROMPTS[1:3]] and info["nfe"].tolist() == [2, 4, 3]
    assert torch.equal(envs.latents[1:], before) and envs.done.tolist() == [False, False, True]
    with pytest.raises(RuntimeError, match="lane 0"):  # its old picture is gone
        envs.final_image(0)
    assert picture.shape == (64, 64, 3)
    envs.step(np.array([STOP, STOP, STOP]))
    with pytest.raises(gym.error.ResetNeeded, match="every lane has ended"):
        envs.step(np.array([0, 0, 0]))


@pytest.mark.parametrize("mask", [[True], [0, 1], [False, False], "all"])
def test_bad_reset_masks_are_quoted(small_kwargs: Kwargs, mask: Any) -> None:
    with pytest.raises(ValueError, match="reset_mask must be 2 booleans"):
        vector(small_kwargs).reset(options={"reset_mask": mask})


def trajectory(env: DiffusionDenoiseEnv, **reset: Any) -> Iterator[Any]:
    observation, info = env.reset(**reset)
    yield observation, info["prompt"], info["seed"]
    for action in (CONTINUE, REFINE, CONTINUE, REFINE, STOP):
        observation, reward, terminated, _, info = env.step(action)
        yield observation, reward, terminated, env.latents.numpy().copy()


@pytest.mark.parametrize("mask", ["neglected_token", "random"])
def test_same_seed_and_actions_are_identical(small_kwargs: Kwargs, mask: str) -> None:
    options = {"prompt": PROMPTS[2], "seed": 7}
    one, two = (list(trajectory(single(small_kwargs, mask=mask), options=options)) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_reset_seed_alone_is_reproducible(small_kwargs: Kwargs) -> None:
    env = single(small_kwargs)
    torch.manual_seed(1)
    one = list(trajectory(env, seed=5))
    torch.manual_seed(2)  # only np_random counts
    np.random.seed(3)
    two = list(trajectory(env, seed=5))
    for a, b in zip(one, two, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
    other = env.reset()[1]
    assert (other["prompt"], other["seed"]) != one[0][1:]
    infos = [vector(small_kwargs).reset(seed=9)[1] for _ in range(2)]
    assert infos[0]["seed"].tolist() == infos[1]["seed"].tolist() and len(set(infos[0]["seed"])) == 2


# ------------------------------------------------------------------ accounting


@pytest.mark.parametrize("finish_steps", [0, 3])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_nfe_by_hand(small_kwargs: Kwargs, finish_steps: int, scale: float) -> None:
    env = single(small_kwargs, finish_steps=finish_steps, guidance_scale=scale, refine_k=3, max_nfe=20)
    _, info = env.reset(options={"prompt": PROMPTS[0], "seed": 0})
    seen = [info["nfe"]]
    for action in (CONTINUE, REFINE, STOP):
        *_, terminated, _, info = env.step(action)
        assert info["action_taken"] == action
        seen.append(info["nfe"])
    assert terminated and seen == [2, 3, 6, 6 + finish_steps]
    passes = 2 if scale > 1 else 1
    assert info["forward_passes"] == passes * info["nfe"]
    flops = env.vector.flops_per_call
    looks = 3 * flops["look"] + flops["decode"]  # reset, continue, refine; then the final picture
    texts = passes * flops["text"] + env.vector.perception.text_flops()  # guidance encodes the empty prompt too
    by_hand = texts + info["nfe"] * passes * flops["denoiser"] + looks
    assert info["net_flops"] == pytest.approx(by_hand)
    assert env.vector.pictures[0] is not None and env.final_image().shape == (64, 64, 3)


def test_stopping_decodes_the_latest_x0(small_kwargs: Kwargs) -> None:
    env = single(small_kwargs)
    env.reset(options={"prompt": PROMPTS[0], "seed": 0})
    x0, preview = env.vector.x0.clone(), env.vector.preview_images()[0]
    _, _, terminated, _, info = env.step(STOP)
    assert terminated and torch.equal(env.latents, x0) and info["nfe"] == 2
    np.testing.assert_array_equal(env.final_image(), preview)


def test_budget_ends_the_episode_exactly(small_kwargs: Kwargs) -> None:
    env = single(small_kwargs, max_nfe=7)
    env.reset(options={"prompt": PROMPTS[0], "seed": 0})
    steps = [env.step(action) for action in (REFINE, REFINE, CONTINUE)]
    assert [s[4]["nfe"] for s in steps] == [4, 6, 7] and [s[2] for s in steps] == [False, False, True]
    assert steps[1][4]["action_mask"].tolist() == [True, True, False]
    env.reset(options={"prompt": PROMPTS[0], "seed": 0})
    last = [env.step(REFINE) for _ in range(3)][-1]  # the third cannot be paid for
    assert last[2] and last[4]["nfe"] == 6 and last[4]["action_taken"] == STOP


def test_capped_refinement_is_carried_out_as_continue(small_kwargs: Kwargs) -> None:
    kwargs = {**small_kwargs, "max_refines": 1}
    env, plain = single(kwargs), single(kwargs)
    for e in (env, plain):
        _, info = e.reset(options={"prompt": PROMPTS[0], "seed": 0})
        assert info["action_mask"].tolist() == [True, True, True]
        *_, info = e.step(REFINE)
        assert info["action_taken"] == REFINE and info["action_mask"].tolist() == [True, True, False]
        assert e.action_masks().tolist() == [True, True, False]
    refined, continued = env.step(REFINE), plain.step(CONTINUE)
    assert refined[4]["action_taken"] == CONTINUE and refined[1] == continued[1]
    assert torch.equal(env.latents, plain.latents)


@pytest.fixture(scope="module")
def budgeted(small_kwargs: Kwargs) -> dict[tuple[int, int], DiffusionDenoiseEnv]:
    """Environments by their finishing steps and budget."""
    cases = [(finish, budget) for finish in (0, 2) for budget in (7, 8, 12)]
    return {(f, b): single(small_kwargs, max_nfe=b, finish_steps=f, observe_every=3) for f, b in cases}


@given(st.lists(st.integers(0, 2), min_size=1, max_size=15), st.sampled_from([0, 2]), st.sampled_from([7, 8, 12]))
@hypothesis_settings(max_examples=25)
def test_budget_is_never_exceeded(
    budgeted: dict[tuple[int, int], DiffusionDenoiseEnv], actions: list[int], finish: int, budget: int
) -> None:
    env = budgeted[finish, budget]
    _, info = env.reset(options={"prompt": PROMPTS[0], "seed": 0})
    for action in actions:
        allowed, before = info["action_mask"], info
        _, _, terminated, truncated, info = env.step(action)
        assert before["nfe"] < info["nfe"] <= budget or info["action_taken"] == STOP and info["nfe"] <= budget
        assert info["net_flops"] > before["net_flops"] and not truncated
        if allowed[action]:
            assert info["action_taken"] == action
        if terminated:
            return
        assert 0 < info["step_index"] < 6 and info["nfe"] + 1 + finish <= budget


def test_reward_components_add_up(small_kwargs: Kwargs) -> None:
    env = single(small_kwargs, reward={"efficiency": 0.5, "shaping": 0.7})
    _, info = env.reset(options={"prompt": PROMPTS[0], "seed": 0})
    config = env.vector.reward_config

    def phi(info: dict[str, Any]) -> float:
        return float(quality(np.float64(info["clip_score"]), np.float64(info["reward_score"]), config))

    for action, paid in ((CONTINUE, 1), (REFINE, 2), (STOP, 0)):
        before = phi(info)
        _, reward, terminated, _, info = env.step(action)
        parts = info["reward_components"]
        assert reward == parts["total"] == pytest.approx(sum(parts[name] for name in COMPONENTS))
        assert parts["efficiency"] == -0.5 * paid and parts["instability"] <= 0
        assert parts["shaping"] == pytest.approx(0.7 * ((0 if terminated else phi(info)) - before), abs=1e-6)
        assert parts["terminal"] == pytest.approx(phi(info) if terminated else 0)


def test_steps_without_a_look_cost_no_instability(small_kwargs: Kwargs) -> None:
    env = single(small_kwargs, observe_every=2, reward={"instability": 100.0})
    env.reset(options={"prompt": PROMPTS[0], "seed": 0})
    parts = [env.step(CONTINUE)[4]["reward_components"] for _ in range(3)]
    assert parts[0]["instability"] == parts[2]["instability"] == 0 > parts[1]["instability"]
    assert parts[0]["shaping"] == parts[2]["shaping"] == 0


# ------------------------------------------------------------------ what a step asks of the device


@pytest.mark.parametrize(("preview", "mode"), [("vae", "rewind"), ("latent_rgb", "in_place")])
def test_a_step_asks_for_a_few_numbers_only(
    small_kwargs: Kwargs, monkeypatch: pytest.MonkeyPatch, preview: str, mode: str
) -> None:
    """Fault flags, then what the look showed, finite or not; the final picture of a lane that has ended, no more."""
    more = {"obs_backend": "torch", "preview": preview, "refine_mode": mode}
    envs = vector(small_kwargs, 3, mask="grid", **more)  # torch.quantile, of other masks, asks on the CPU only
    start(envs)
    picture = 3 * 64 * 64
    for actions, ended in (([CONTINUE] * 3, 0), ([CONTINUE, REFINE, REFINE], 0), ([CONTINUE, REFINE, STOP], 1)):
        with monkeypatch.context() as patch, Waits(patch) as waits:
            envs.step(np.array(actions))
        assert waits.asked == []
        assert waits.sizes == [3, 4 * 3, *[picture] * ended]


LATENTS_ALONE: Kwargs = {
    "reads": ["clip_text", "reward"],
    "reward": {"clip_weight": 0, "instability": 0},
    "price_range": [0.001, 0.016],
}


@pytest.mark.parametrize("looks", [{}, LATENTS_ALONE], ids=["pictures", "latents"])
@pytest.mark.parametrize(
    "actions", [[CONTINUE] * 4, [REFINE] * 4, [REFINE, REFINE, STOP, STOP]], ids=["continue", "refine", "mixed"]
)
def test_what_a_step_calls_does_not_grow_with_the_lanes(
    small_kwargs: Kwargs, small_verifier: Path, monkeypatch: pytest.MonkeyPatch, actions: list[int], looks: Kwargs
) -> None:
    """Waits, operations of torch and functions of Python; noise alone is drawn lane by lane, on the host."""
    calls: dict[int, Calls] = {}
    waits: dict[int, Waits] = {}
    more = {"mask": "grid", "obs_backend": "torch"} | looks | ({"scorer": str(small_verifier)} if looks else {})
    for lanes in (4, 16):
        envs = vector(small_kwargs, lanes, **more)
        envs.reset(seed=0, options={"prompt": [PROMPTS[k % len(PROMPTS)] for k in range(lanes)]})
        envs.step(np.full(lanes, CONTINUE))  # what is computed once has been
        repeated, saved = np.array(actions * (lanes // 4)), envs.state_dict()
        with Calls() as calls[lanes]:
            envs.step(repeated)
        envs.load_state_dict(saved)
        with monkeypatch.context() as patch, Waits(patch) as waits[lanes]:
            envs.step(repeated)
    refined, ended = actions.count(REFINE), STOP in actions
    assert [of.operations.pop("aten.randn.generator", 0) for of in calls.values()] == [refined, 4 * refined]
    assert calls[4].operations == calls[16].operations and calls[4].functions == calls[16].functions
    assert waits[4].asked == waits[16].asked == []
    assert [len(of.sizes) for of in waits.values()] == [2 + ended] * 2  # faults, what was seen, final pictures


def test_prices_are_sent_to_the_device_when_they_change(small_kwargs: Kwargs, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds, sent = [0.001, 0.016], []
    envs = vector(small_kwargs, 3, price_range=bounds)
    slot = sum(width for name, width in envs.parts.items() if name != "quality") - 1

    def spy(of: Any, prices: Any) -> Any:
        sent.append(prices.copy())
        return position(of, prices)

    monkeypatch.setattr("addiff_env.env.observer.position", spy)
    observations = [envs.reset(options={"price": 0.002})[0]]
    observations += [envs.step([CONTINUE] * 3)[0] for _ in range(2)]
    observations += [envs.reset(options={"price": 0.004, "reset_mask": np.arange(3) == 1})[0]]
    wanted = [[0.002] * 3] * 3 + [[0.002, 0.004, 0.002]]
    np.testing.assert_allclose([seen[:, slot] for seen in observations], position(bounds, wanted), rtol=1e-6)
    np.testing.assert_array_equal(sent, [wanted[0], wanted[-1]])


def test_no_call_is_larger_than_the_batch_size(small_kwargs: Kwargs, monkeypatch: pytest.MonkeyPatch) -> None:
    envs = vector(small_kwargs, 4, batch_size=3)
    sizes: dict[str, list[int]] = {"predict": [], "decode": [], "look": []}

    def spied(name: str, call: Any) -> Any:
        def spy(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            sizes[name].append(len(first))
            return call(first, *args, **kwargs)

        return spy

    for owner, name in ((envs.backbone, "predict"), (envs.backbone, "decode"), (envs.perception, "look")):
        monkeypatch.setattr(owner, name, spied(name, getattr(owner, name)))
    start(envs)
    envs.step(np.full(4, CONTINUE))
    assert sizes == {"predict": [3, 1] * 3, "decode": [3, 1] * 2, "look": [3, 1] * 2}
    assert envs.preview_images().shape == (4, 64, 64, 3) and sizes["decode"] == [3, 1] * 3


@pytest.mark.parametrize("mode", ["rewind", "in_place"])
def test_attention_is_captured_where_somebody_reads_it(
    small_kwargs: Kwargs, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Of several evaluations in one action only the last one's maps are ever seen."""
    envs = vector(small_kwargs, 1, refine_mode=mode, refine_k=3, finish_steps=2, max_nfe=20)
    captured: list[bool] = []
    predict = envs.backbone.predict

    def spy(*args: Any) -> Any:
        captured.append(args[-1])
        return predict(*args)

    monkeypatch.setattr(envs.backbone, "predict", spy)
    start(envs)
    assert captured == [False, True]
    for action, expected in ((CONTINUE, [True]), (REFINE, [False, False, True]), (STOP, [False, True])):
        captured.clear()
        envs.step(np.array([action]))
        assert captured == expected


# ------------------------------------------------------------------ RegionRefine


def constant_mask(monkeypatch: pytest.MonkeyPatch, mask: torch.Tensor) -> None:
    """Every lane's refinement gets this mask (1, h, w)."""
    monkeypatch.setattr(
        "addiff_env.env.refine.make_masks", lambda denoiser, state, lanes: mask.expand(len(lanes), 1, 16, 16)
    )


def at_step(kwargs: Kwargs, step: int, **more: Any) -> DiffusionDenoiseVectorEnv:
    envs = vector({**kwargs, "num_inference_steps": 10, "max_nfe": 30, **more}, 1)
    start(envs)
    while envs.step_index[0] < step:
        envs.step([CONTINUE])
    return envs


def guided(envs: DiffusionDenoiseVectorEnv, sample: torch.Tensor, t: Any) -> torch.Tensor:
    """The U-Net's guided output, by diffusers' own parts."""
    pipeline = pipeline_of(envs)
    with torch.no_grad():
        context, empty = pipeline.encode_prompt(envs.prompt[0], "cpu", 1, True)
        output = pipeline.unet(torch.cat([sample] * 2), t, encoder_hidden_states=torch.cat([empty, context])).sample
    without, text = output.chunk(2)
    return without + envs.config.guidance_scale * (text - without)


def test_rewind_with_a_zero_mask_restores_x0(small_kwargs: Kwargs, monkeypatch: pytest.MonkeyPatch) -> None:
    constant_mask(monkeypatch, torch.zeros(1, 16, 16))
    envs = at_step(small_kwargs, 6)
    old, noise, scheduler = envs.x0.clone(), next_noise(envs), scheduler_of(envs)
    envs.step([REFINE])
    assert envs.step_index.tolist() == [3]  # 849 lies between 899 and 799; the noisier one, then k = 2 on
    assert torch.equal(envs.x0, old)
    close(envs.latents, scheduler.add_noise(old, noise, scheduler.timesteps[3:4]), 1e-5)


def test_rewind_with_a_full_mask_denoises_anew(small_kwargs: Kwargs) -> None:
    envs = at_step(small_kwargs, 6, mask="full", renoise=0.8)
    scheduler = scheduler_of(envs)
    sample = scheduler.add_noise(envs.x0.clone(), next_noise(envs), scheduler.timesteps[2:3])  # 0.8 T is on the grid
    for t in scheduler.timesteps[2:4]:
        sample, x0 = scheduler.step(guided(envs, sample, t), t, sample, return_dict=False)
    envs.step([REFINE])
    assert envs.step_index.tolist() == [4] and envs.nfe.tolist() == [8]
    close(envs.latents, sample)
    close(envs.x0, x0)
    while not envs.done[0]:  # and goes on as the schedule does
        envs.step([CONTINUE])
    for t in scheduler.timesteps[4:]:
        sample = scheduler.step(guided(envs, sample, t), t, sample).prev_sample
    close(envs.latents, sample)
    assert envs.nfe.tolist() == [14]


def test_in_place_with_a_zero_mask_keeps_x0(small_kwargs: Kwargs, monkeypatch: pytest.MonkeyPatch) -> None:
    constant_mask(monkeypatch, torch.zeros(1, 16, 16))
    envs = at_step(small_kwargs, 6, refine_mode="in_place")
    old, noise, scheduler = envs.x0.clone(), next_noise(envs), scheduler_of(envs)
    envs.step([REFINE])
    assert envs.step_index.tolist() == [6] and envs.nfe.tolist() == [8]
    assert torch.equal(envs.x0, old)
    close(envs.latents, scheduler.add_noise(old, noise, scheduler.timesteps[6:7]), 1e-5)


def test_in_place_with_a_full_mask_by_hand(small_kwargs: Kwargs) -> None:
    envs = at_step(small_kwargs, 6, refine_mode="in_place", mask="full")
    scheduler, noise = scheduler_of(envs), next_noise(envs)
    a, b = scheduler.alphas_cumprod[849], scheduler.alphas_cumprod[424]
    sample = a.sqrt() * envs.x0 + (1 - a).sqrt() * noise
    v = guided(envs, sample, 849)
    x0, epsilon = a.sqrt() * sample - (1 - a).sqrt() * v, a.sqrt() * v + (1 - a).sqrt() * sample
    sample = b.sqrt() * x0 + (1 - b).sqrt() * epsilon
    x0 = b.sqrt() * sample - (1 - b).sqrt() * guided(envs, sample, 424)
    envs.step([REFINE])
    close(envs.x0, x0)
    close(envs.latents, scheduler.add_noise(x0, noise, scheduler.timesteps[6:7]))


@pytest.mark.parametrize("mode", ["rewind", "in_place"])
def test_outside_the_mask_is_noised_to_the_level_of_the_call(
    small_kwargs: Kwargs, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    mask = torch.zeros(1, 16, 16)
    mask[..., :8] = 1
    constant_mask(monkeypatch, mask)
    envs = at_step(small_kwargs, 7, refine_mode=mode, refine_k=3)
    old, noise, scheduler = envs.x0.clone(), next_noise(envs), scheduler_of(envs)
    calls, predict = [], envs.backbone.predict

    def spy(latents: torch.Tensor, timesteps: torch.Tensor, level: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((latents.clone(), timesteps.clone(), level.alpha**2))
        return predict(latents, timesteps, level, *args, **kwargs)

    monkeypatch.setattr(envs.backbone, "predict", spy)
    envs.step([REFINE])
    assert len(calls) == 3
    for latents, timesteps, alphas in calls:
        close(alphas, scheduler.alphas_cumprod[timesteps].double(), 1e-6)
        expected = scheduler.add_noise(old, noise, timesteps)
        close(latents[..., 8:], expected[..., 8:], 1e-5)
    assert not torch.allclose(calls[1][0][..., :8], scheduler.add_noise(old, noise, calls[1][1])[..., :8], atol=1e-3)
    assert torch.equal(envs.x0[..., 8:], old[..., 8:]) and not torch.allclose(envs.x0[..., :8], old[..., :8])


@pytest.mark.parametrize(("renoise", "index"), [(0.9, 1), (0.5, 5), (1.0, 0), ("relative:1.0", 6)])
def test_rewind_goes_where_renoise_says(small_kwargs: Kwargs, renoise: float | str, index: int) -> None:
    envs = at_step(small_kwargs, 6, renoise=renoise, refine_k=1)  # stands at timestep 399
    envs.step([REFINE])
    assert envs.step_index.tolist() == [index + 1]


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_kind_runs(small_kwargs: Kwargs, mask: str) -> None:
    envs = at_step(small_kwargs, 4, mask=mask)
    envs.step([REFINE])
    least = -1 if mask == "neglected_object" else 0.2  # of which there may be none
    assert 0 <= envs.refine_mask.min() and envs.refine_mask.max() <= 1 + 1e-6 and envs.refine_mask.mean() > least
    assert torch.isfinite(envs.latents).all()


def test_bfloat16_stays_bfloat16(small_kwargs: Kwargs) -> None:
    env = single(small_kwargs, dtype="bfloat16", obs_mode="dict")
    env.reset(options={"prompt": PROMPTS[0], "seed": 0})
    for action in (CONTINUE, REFINE, STOP):
        observation, reward, terminated, _, _ = env.step(action)
        assert env.observation_space.contains(observation) and np.isfinite(reward)
        assert env.latents.dtype == torch.bfloat16 and torch.isfinite(env.latents).all()
    assert terminated
