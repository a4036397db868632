"""What SD, SDXL and Flux have in common: lanes, attention, previews, costs, the shared model, faults."""

import gc
import json
import logging
import pickle
import warnings
import weakref
from pathlib import Path
from typing import Any

import gymnasium as gym
import models
import numpy as np
import open_clip
import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rounding import assert_same_but_for_rounding
from safetensors.torch import save_file
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import addiff_env
from addiff_env.diffusion.attention import capture_joint_attention
from addiff_env.diffusion.backbones import load_backbone
from addiff_env.diffusion.backbones.flux import FluxBackbone, pack_latents, unpack_latents
from addiff_env.env import DiffusionDenoiseEnv, DiffusionDenoiseVectorEnv
from addiff_env.env.refine import make_masks
from addiff_env.perception.previews import LinearDecoder, fit_latent_rgb, make_previewer

CONTINUE, STOP, REFINE = range(3)
PROMPTS = ["a red circle", "two blue squares", "a star above a green ring", "a pink cross and a large circle"]
SEEDS = [11, 12, 13, 14]
SETTINGS: dict[str, dict[str, Any]] = {  # what each backbone needs besides its folder
    "sd": {"solver": "dpmpp_2m", "guidance_scale": 4.0},
    "sd-eta": {"eta": 0.7, "guidance_scale": 4.0},
    "sdxl": {"guidance_scale": 4.0},
    "flux": {"solver": "euler", "guidance_scale": 0.0},
}
Kwargs = dict[str, Any]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {kind: models.save(kind, root / kind) for kind in models.BUILDERS}
    return {**made, "sd-eta": made["sd"]}


@pytest.fixture
def kwargs(
    request: pytest.FixtureRequest, tiny_kwargs: Kwargs, small_looks: dict[str, str], folders: dict[str, Path]
) -> Kwargs:
    """Another backbone, seen by `small_looks`: few steps, small budget."""
    kind = getattr(request, "param", "sd")
    common = {"dtype": "float32", "num_inference_steps": 6, "warmup_steps": 2, "max_nfe": 14, "attention_stride": 2}
    return {**tiny_kwargs, **small_looks, **common, "model": str(folders[kind]), **SETTINGS[kind]}


every_backbone = pytest.mark.parametrize("kwargs", sorted(SETTINGS), indirect=True)


def vector(kwargs: Kwargs, num_envs: int = 2, mode: AutoresetMode = AutoresetMode.DISABLED, **more: Any) -> Any:
    envs = gym.make_vec("AdDiffusion-Tiny-v0", num_envs=num_envs, autoreset_mode=mode, **{**kwargs, **more}).unwrapped
    assert isinstance(envs, DiffusionDenoiseVectorEnv)
    return envs


def single(kwargs: Kwargs, **more: Any) -> DiffusionDenoiseEnv:
    env = gym.make("AdDiffusion-Tiny-v0", **{**kwargs, **more}).unwrapped
    assert isinstance(env, DiffusionDenoiseEnv)
    return env


def start(envs: DiffusionDenoiseVectorEnv) -> Any:
    return envs.reset(options={"prompt": PROMPTS[: envs.num_envs], "seed": SEEDS[: envs.num_envs]})


# ------------------------------------------------------------------ lanes


def episode(env: DiffusionDenoiseEnv, prompt: str, seed: int, plan: list[int]) -> tuple[list[float], int, torch.Tensor]:
    env.reset(options={"prompt": prompt, "seed": seed})
    rewards, info = [], {"nfe": 0}
    for action in plan:
        _, reward, terminated, _, info = env.step(action)
        rewards.append(reward)
        if terminated:
            break
    return rewards, info["nfe"], env.latents.clone()


@every_backbone
@pytest.mark.parametrize("mode", ["rewind", "in_place"])
def test_lanes_equal_single_runs(kwargs: Kwargs, mode: str) -> None:
    kwargs = {**kwargs, "refine_mode": mode, "mask": "random", "finish_steps": 2, "batch_size": 3}
    plans = [np.random.default_rng(i).choice(3, size=12, p=[0.65, 0.05, 0.3]).tolist() for i in range(4)]
    env, envs = single(kwargs), vector(kwargs, 4)
    start(envs)
    rewards: list[list[float]] = [[] for _ in plans]
    for t in range(12):
        running = ~envs.done
        if not running.any():
            break
        _, reward, *_ = envs.step(np.array([plan[t] for plan in plans]))
        for lane in np.flatnonzero(running):
            rewards[lane].append(float(reward[lane]))
    for lane, plan in enumerate(plans):
        alone, nfe, latents = episode(env, PROMPTS[lane], SEEDS[lane], plan)
        assert nfe == envs.nfe[lane]
        np.testing.assert_allclose(rewards[lane], alone, atol=1e-4)
        assert_same_but_for_rounding(envs.latents[lane], latents[0], 1e-4)


plans = st.lists(st.lists(st.sampled_from([0, 0, 0, 1, 2, 2]), min_size=10, max_size=10), min_size=16, max_size=16)


@given(plans, st.sampled_from(list(AutoresetMode)))
@hypothesis_settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sixteen_lanes_equal_sixteen_runs(kwargs: Kwargs, plans: list[list[int]], mode: AutoresetMode) -> None:
    """First episodes of sixteen lanes, whatever the autoreset mode does with lanes that end earlier."""
    kwargs = {**kwargs, "mask": "random"}
    envs, env = vector(kwargs, 16, mode), single(kwargs)
    prompts, seeds = [PROMPTS[i % 4] for i in range(16)], list(range(16))
    envs.reset(options={"prompt": prompts, "seed": seeds})
    rewards: list[list[float]] = [[] for _ in plans]
    finals: list[torch.Tensor | None] = [None] * 16
    spent, running = np.zeros(16, int), np.ones(16, bool)
    for t in range(10):
        if not running.any():
            break
        _, reward, terminated, _, info = envs.step(np.array([plan[t] for plan in plans]))
        last = info["final_info"] if mode == AutoresetMode.SAME_STEP and terminated.any() else info
        for lane in np.flatnonzero(running):
            rewards[lane].append(float(reward[lane]))
            spent[lane] = (last if terminated[lane] else info)["nfe"][lane]
            gone = mode == AutoresetMode.SAME_STEP and terminated[lane]  # the next episode's are there already
            finals[lane] = None if gone else envs.latents[lane].clone()
        running &= ~terminated
    for lane, plan in enumerate(plans):
        alone, nfe, latents = episode(env, prompts[lane], seeds[lane], plan)
        assert nfe == spent[lane]
        np.testing.assert_allclose(rewards[lane], alone, atol=1e-4)
        if (final := finals[lane]) is not None:
            assert_same_but_for_rounding(final, latents[0], 1e-4)


@every_backbone
def test_observations_and_pictures(kwargs: Kwargs) -> None:
    envs = vector(kwargs, 2, obs_mode="dict", render_mode="rgb_array")
    observation, _ = start(envs)
    for actions in ([CONTINUE, REFINE], [REFINE, CONTINUE], [STOP, STOP]):
        assert envs.observation_space.contains(observation)
        observation, reward, *_ = envs.step(np.array(actions))
        assert np.isfinite(reward).all()
    assert envs.done.all() and all(p.shape == (64, 64, 3) for p in envs.render())
    assert observation["unet"].shape == (2, envs.backbone.feature_width) and observation["unet"].std() > 0


def test_only_the_refined_lane_forgets(kwargs: Kwargs) -> None:
    envs = vector(kwargs, 3)
    assert envs.schedule.multistep
    start(envs)
    assert envs.has_previous.tolist() == [True] * 3
    envs.step(np.array([CONTINUE, REFINE, CONTINUE]))
    assert envs.has_previous.tolist() == [True, False, True]
    envs.step(np.full(3, CONTINUE))
    assert envs.has_previous.tolist() == [True] * 3
    envs.reset(options={"reset_mask": np.array([True, False, False])})
    assert envs.has_previous.tolist() == [True] * 3 and envs.step_index.tolist()[0] == 2


@pytest.mark.parametrize("number", [1, 2])
def test_short_schedules_without_warm_up(kwargs: Kwargs, number: int) -> None:
    env = single(kwargs, num_inference_steps=number, warmup_steps=0, obs_mode="dict")
    observation, info = env.reset(options={"prompt": PROMPTS[0], "seed": 0})
    assert info["nfe"] == 0 and not observation["clip_image"].any() and not observation["unet"].any()
    assert env.action_masks().tolist() == [True, False, False]
    _, _, terminated, _, info = env.step(STOP)  # there is nothing to stop with yet
    assert info["action_taken"] == CONTINUE and info["nfe"] == 1 and terminated == (number == 1)


# ------------------------------------------------------------------ seeds


def test_a_seed_per_lane_is_what_single_environments_draw(kwargs: Kwargs) -> None:
    envs, env = vector(kwargs), single(kwargs)
    _, info = envs.reset(seed=[5, 8])
    for lane, seed in enumerate((5, 8)):
        _, alone = env.reset(seed=seed)
        assert (info["prompt"][lane], info["seed"][lane]) == (alone["prompt"], alone["seed"])
    later = [envs.reset()[1]["seed"].tolist() for _ in range(2)]
    envs.reset(seed=[5, 8])
    assert [envs.reset()[1]["seed"].tolist() for _ in range(2)] == later
    with pytest.raises(ValueError, match="3 seeds for 2 lanes"):
        envs.reset(seed=[1, 2, 3])


# ------------------------------------------------------------------ faults


def test_a_lane_that_breaks_down_ends_alone(kwargs: Kwargs, monkeypatch: pytest.MonkeyPatch) -> None:
    envs, clean = vector(kwargs, 3, obs_mode="dict"), vector(kwargs, 3, obs_mode="dict")
    start(envs)
    start(clean)
    predict, last = envs.backbone.predict, envs.x0[1].clone()

    def broken(latents: torch.Tensor, *args: Any, **more: Any) -> Any:
        now = predict(latents, *args, **more)
        now.x0[1], now.features[1], now.maps[1] = torch.nan, torch.inf, torch.nan
        return now

    monkeypatch.setattr(envs.backbone, "predict", broken)
    observation, reward, terminated, _, info = envs.step(np.full(3, CONTINUE))
    monkeypatch.setattr(envs.backbone, "predict", predict)
    _, expected, *_ = clean.step(np.full(3, CONTINUE))
    assert terminated.tolist() == [False, True, False] and info["fault"].tolist() == [False, True, False]
    assert info["reward_components"]["fault"].tolist() == [0, -1, 0] and info["reward_components"]["terminal"][1] == 0
    assert reward[1] < -1 and np.isfinite(reward).all()
    assert envs.observation_space.contains(observation)
    torch.testing.assert_close(envs.latents[1], last)
    np.testing.assert_allclose(reward[[0, 2]], expected[[0, 2]], atol=1e-6)
    envs.step(np.full(3, CONTINUE))  # the others go on
    assert envs.final_image(1).shape == (64, 64, 3)
    _, info = envs.reset()
    assert not info["fault"].any()


def test_latents_that_are_not_finite_are_refused(kwargs: Kwargs) -> None:
    envs = vector(kwargs)
    latents = torch.zeros(2, *envs.latent_shape)
    for value in (torch.nan, -torch.inf):
        latents[0, 0, 0, 0] = value
        with pytest.raises(ValueError, match="finite, 1 of their values"):
            envs.reset(options={"latents": latents})


# ------------------------------------------------------------------ one model for many environments


def test_environments_share_their_models_and_the_last_frees_them(tiny_kwargs: Kwargs, tmp_path: Path) -> None:
    folder = models.save("sd", tmp_path / "alone")
    kwargs = {**tiny_kwargs, "model": str(folder), "attention_stride": 2, "dtype": "float32"}
    one, two = vector(kwargs), vector(kwargs, 1)
    assert one.backbone is two.backbone and one.perception.clip is two.perception.clip
    model = weakref.ref(one.backbone.unet)
    one.close()
    with pytest.raises(gym.error.ClosedEnvironmentError):
        one.reset()
    gc.collect()
    assert model() is not None
    two.close()
    gc.collect()
    assert model() is None


# ------------------------------------------------------------------ attention


@pytest.mark.parametrize("kwargs", ["sd", "sdxl", "flux"], indirect=True)
@pytest.mark.parametrize("mask", ["neglected_object", "unattended"])
def test_masks_that_follow_objects_are_made_of_any_backbones_attention(kwargs: Kwargs, mask: str) -> None:
    envs = vector({**kwargs, "mask": mask}, 2)
    envs.reset(options={"prompt": PROMPTS[:2], "seed": [0, 1]})
    size = envs.latents.shape[2:]
    envs.denoiser.step(envs.state, np.arange(2))
    made = make_masks(envs.denoiser, envs.state, np.arange(2))
    assert made.shape == (2, 1, *size) and 0 <= made.min() <= made.max() <= 1 + 1e-6
    content, maps = envs.state.conditioning.content, torch.full_like(envs.state.maps, 0.01)
    for lane in range(2):  # the first word's object is in one corner, every other's in the other one
        tokens = torch.nonzero(content[lane]).flatten()
        maps[lane, tokens[0], 0, 0], maps[lane, tokens[1:], -1, -1] = 0.1, 0.9
    envs.state.maps[:] = maps
    first, last = ((..., 0, 0), (..., -1, -1))
    made = make_masks(envs.denoiser, envs.state, np.arange(2))
    assert (made[first] > 0.5).all() and (made[last] < 0.5).all()
    envs.step([REFINE] * 2)
    assert torch.isfinite(envs.latents).all()


def test_flux_maps_by_hand(folders: dict[str, Path]) -> None:
    """Image-query rows of the joint softmax, written out in full, renormalised over the text's keys."""
    backbone = load_backbone(str(folders["flux"]), attention_stride=2)
    assert isinstance(backbone, FluxBackbone)
    shape = backbone.latent_shape(32, 48)
    latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    conditioning = backbone.encode_prompts(PROMPTS[:2])
    inputs = backbone._inputs(latents, torch.tensor([700.0, 300.0]), conditioning, 1.0)
    seen: list[Any] = []
    attn = backbone.transformer.transformer_blocks[1].attn
    hook = attn.register_forward_pre_hook(lambda module, args, kw: seen.append(kw), with_kwargs=True)
    with torch.no_grad(), capture_joint_attention(backbone.transformer, [1]) as record:
        backbone.transformer(**inputs)
    hook.remove()
    image, text = seen[0]["hidden_states"], seen[0]["encoder_hidden_states"]
    cos, sin = seen[0]["image_rotary_emb"]

    def turned(x: torch.Tensor) -> torch.Tensor:  # rotary embedding of (B, S, heads, dim), pairs of neighbours
        pairs = x.unflatten(-1, (-1, 2))
        swapped = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
        return x * cos[None, :, None] + swapped * sin[None, :, None]

    heads = (-1, attn.head_dim)
    query = torch.cat(
        [
            attn.norm_added_q(attn.add_q_proj(text).unflatten(-1, heads)),
            attn.norm_q(attn.to_q(image).unflatten(-1, heads)),
        ],
        1,
    )
    key = torch.cat(
        [
            attn.norm_added_k(attn.add_k_proj(text).unflatten(-1, heads)),
            attn.norm_k(attn.to_k(image).unflatten(-1, heads)),
        ],
        1,
    )
    joint = (torch.einsum("bqhd,bkhd->bhqk", turned(query), turned(key)) * attn.head_dim**-0.5).softmax(-1)
    tokens = text.shape[1]
    rows = joint[:, :, tokens:, :tokens]
    expected = (rows / rows.sum(-1, keepdim=True)).mean(1).transpose(1, 2).unflatten(2, (4, 6))
    torch.testing.assert_close(record.maps(4, 6), expected, rtol=1e-4, atol=1e-6)


@every_backbone
def test_looking_at_attention_changes_nothing(kwargs: Kwargs) -> None:
    """Not a bit of the prediction, and nothing is left in the network afterwards."""
    envs = vector(kwargs)
    start(envs)
    network = getattr(envs.backbone, "unet", None) or envs.backbone.transformer
    before = [(module, getattr(module, "processor", None)) for module in network.modules()]
    at = torch.tensor([1, 4])
    inputs = (envs.latents, envs.schedule.timesteps[at], envs.schedule.current.at(at), envs.conditioning)
    seen, unseen = (envs.backbone.predict(*inputs, kwargs["guidance_scale"], capture) for capture in (True, False))
    assert torch.equal(seen.x0, unseen.x0) and torch.equal(seen.features, unseen.features)
    assert seen.maps.shape[1] == envs.conditioning.content.shape[1] and unseen.maps.shape[1] == 0
    torch.testing.assert_close(seen.maps.sum(1), torch.ones_like(seen.maps[:, 0]))  # over the tokens of one query
    for module, processor in before:
        assert getattr(module, "processor", None) is processor
        assert not module._forward_hooks and not module._forward_pre_hooks


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
@hypothesis_settings(max_examples=25)
def test_packing_is_diffusers(batch: int, channels: int, rows: int, columns: int) -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(batch, channels, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(0))
    packed = FluxPipeline._pack_latents(latents, batch, channels, 2 * rows, 2 * columns)
    assert torch.equal(pack_latents(latents), packed)
    assert torch.equal(unpack_latents(packed, 2 * rows, 2 * columns), latents)


# ------------------------------------------------------------------ previews


def test_linear_previews_are_the_least_squares(folders: dict[str, Path]) -> None:
    """An autoencoder that is linear by construction is read off exactly."""
    backbone = load_backbone(str(folders["sd"]), attention_stride=2)
    matrix = torch.tensor([[0.5, 0.2, 0.0], [0.1, -0.6, 0.3], [0.0, 0.4, 0.7], [0.3, 0.3, -0.2]])

    def encode(pictures: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.interpolate(pictures, scale_factor=1 / backbone.spatial_factor, mode="area")
        return torch.einsum("cr,brhw->bchw", matrix, small - 0.4)

    original, backbone.encode_pictures = backbone.encode_pictures, encode  # type: ignore[method-assign]
    try:
        decoder = LinearDecoder(backbone)
    finally:
        backbone.encode_pictures = original  # type: ignore[method-assign]
    colours = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    latents = torch.einsum("cr,brhw->bchw", matrix, colours - 0.4)
    pictures = decoder.decode(latents)
    assert pictures.shape == (2, 3, 16, 16)
    small = torch.einsum("rc,bchw->brhw", decoder.weight, latents) + decoder.bias[:, None, None]
    torch.testing.assert_close(small, colours, rtol=0, atol=1e-4)
    assert decoder.flops((4, 4, 4)) == 2 * 3 * 4 * 16


@every_backbone
def test_linear_previews_of_every_backbone(kwargs: Kwargs) -> None:
    envs = vector(kwargs, preview="latent_rgb")
    start(envs)
    assert envs.preview_images().shape == (2, 64, 64, 3)
    assert envs.flops_per_call["preview"] < envs.flops_per_call["decode"] / 100
    envs.step(np.array([STOP, CONTINUE]))
    full = envs.backbone.decode(envs.latents[:1])
    np.testing.assert_array_equal(envs.final_image(0), (full[0] * 255).round().byte().permute(1, 2, 0).numpy())
    weight, _ = fit_latent_rgb(envs.backbone)
    torch.testing.assert_close(weight, envs.previewer.weight)  # the same map every time


def test_distilled_previews(kwargs: Kwargs, tmp_path: Path) -> None:
    widths = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
    blocks = {"num_encoder_blocks": (1,) * 3, "num_decoder_blocks": (1,) * 3}
    tiny = AutoencoderTiny(**widths, **blocks)
    tiny.save_pretrained(tmp_path / "taesd")
    envs = vector(kwargs, preview="taesd", preview_model=str(tmp_path / "taesd"))
    start(envs)
    with torch.no_grad():
        expected = (tiny.decode(envs.x0).sample / 2 + 0.5).clamp(0, 1)
    theirs = (expected * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.abs(envs.preview_images().astype(int) - theirs).max() <= 1
    looks = envs.flops_per_call["start"] + 2 * 2 * envs.flops_per_call["denoiser"] + envs.flops_per_call["look"]
    assert envs.net_flops.tolist() == pytest.approx([looks] * 2)


def test_previews_that_do_not_fit_are_refused(kwargs: Kwargs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs preview_model"):
        vector(kwargs, preview="taesd")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        vector(kwargs, preview="taesd", preview_model=str(tmp_path / "nowhere"))
    AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        num_encoder_blocks=(1,) * 3,
        num_decoder_blocks=(1,) * 3,
        latent_channels=16,
    ).save_pretrained(tmp_path / "taef1")
    with pytest.raises(ValueError, match="16 channels.*4"):
        vector(kwargs, preview="taesd", preview_model=str(tmp_path / "taef1"))
    with pytest.raises(ValueError, match="'jpeg'"):
        make_previewer("jpeg", load_backbone(kwargs["model"], attention_stride=2))


# ------------------------------------------------------------------ costs, refusals


@every_backbone
def test_passes_and_costs(kwargs: Kwargs) -> None:
    envs = vector(kwargs)
    start(envs)
    passes = 1 if kwargs["guidance_scale"] <= 1 else 2
    assert envs.passes_per_nfe == passes
    assert min(envs.flops_per_call.values()) > 0
    before = envs.net_flops.copy()
    envs.step(np.full(2, CONTINUE))
    assert (envs.net_flops - before).tolist() == pytest.approx(
        [passes * envs.flops_per_call["denoiser"] + envs.flops_per_call["look"]] * 2
    )


def test_attention_is_counted(folders: dict[str, Path]) -> None:
    """Twice the picture's side is four times the convolutions and sixteen times the attention."""
    backbone = load_backbone(str(folders["flux"]), attention_stride=2)
    small, large = (backbone.flops("denoiser", backbone.latent_shape(side, side)) for side in (128, 256))
    assert large > 4.2 * small


@pytest.mark.parametrize(
    ("kind", "more", "shown"),
    [
        ("flux", {"attention_stride": 4}, "got 4"),
        ("flux", {"solver": "ddim"}, "'ddim'"),
        ("flux", {"height": 60}, "height .* 8, got 60"),
        ("sd", {"solver": "euler"}, "'euler'"),
        ("sd", {"eta": 0.5}, "0.5"),  # with dpmpp_2m
        ("sd", {"height": 62}, "height .* 8, got 62"),
        ("sd", {"device": "cuda:7"}, "cuda:7"),
        ("sd", {"lora": "nowhere"}, "nowhere"),
    ],
)
def test_settings_that_do_not_fit_are_shown(
    tiny_kwargs: Kwargs, folders: dict[str, Path], kind: str, more: Kwargs, shown: str
) -> None:
    settings = {**tiny_kwargs, "attention_stride": 2, "model": str(folders[kind]), **SETTINGS[kind], **more}
    with pytest.raises((ValueError, FileNotFoundError, ImportError), match=shown):
        gym.make("AdDiffusion-Tiny-v0", **settings)


def test_a_scheduler_that_clips_is_refused(tiny_kwargs: Kwargs, folders: dict[str, Path], tmp_path: Path) -> None:
    """SDXL's pipeline would cut x0 off at 1 with DDIMScheduler's defaults; leaving that out would not be parity."""
    folder = models.with_scheduler(folders["sdxl"], DDIMScheduler(**models.BETAS), tmp_path / "clips")
    settings = {**tiny_kwargs, "attention_stride": 2, "model": str(folder)}
    with pytest.raises(ValueError, match="clip_sample = True"):
        gym.make("AdDiffusion-Tiny-v0", **settings)


def test_pipelines_of_other_kinds_are_refused(tiny_kwargs: Kwargs, folders: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import DDIMPipeline, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        norm_num_groups=4,
        up_block_types=("UpBlock2D",),
    )
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="DDIMPipeline; supported: StableDiffusionPipeline"):
        gym.make("AdDiffusion-Tiny-v0", **{**tiny_kwargs, "model": str(tmp_path / "other")})


# ------------------------------------------------------------------ ids


def test_a_prompt_of_three_hundred_words_is_cut_and_what_is_dropped_said(
    kwargs: Kwargs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    prompt = " ".join(["a red circle left of a blue square"] * 37 + ["above", "a", "green", "ring"])
    assert len(prompt.split()) == 300
    envs = vector(kwargs, 2)
    with pytest.warns(UserWarning, match="prompt truncated to .* dropped: .*above a green ring") as said:
        observation, info = envs.reset(options={"prompt": [prompt, "a ring"], "seed": [0, 1]})
    assert len([warning for warning in said if "truncated" in str(warning.message)]) == 1
    assert not caplog.records  # the tokenizer's own warning, of errors that there will be, is wrong here
    assert envs.observation_space.contains(observation) and info["prompt"][0] == prompt
    while not envs.done.all():
        envs.step(np.full(2, CONTINUE))
    assert not envs.fault.any()


LOCAL = {"AdDiffusion-SD15-v0": "sd", "AdDiffusion-SDXL-v0": "sdxl", "AdDiffusion-FluxSchnell-v0": "flux"}


@pytest.mark.parametrize("env_id", sorted(LOCAL))
def test_every_id_runs_on_its_own_kind_of_model(env_id: str, tiny_kwargs: Kwargs, folders: dict[str, Path]) -> None:
    """The ids' own settings, but for weights that would have to be downloaded and pictures of 64 pixels."""
    local = {name: addiff_env.TINY[name] for name in ("clip", "dino", "scorer")} | tiny_kwargs
    small = {"height": 64, "width": 64, "attention_stride": 2, "preview": "latent_rgb", "device": "cpu"}
    steps = {"num_inference_steps": 4, "warmup_steps": 1, "max_nfe": 8, "dtype": "float32"}
    settings = {**local, **small, **steps, "model": str(folders[LOCAL[env_id]])}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the tokenizer does not know")  # everyday words, small vocabulary
        warnings.filterwarnings("ignore", message="prompt truncated")
        envs = gym.make_vec(env_id, num_envs=2, **settings)
        assert isinstance(envs.unwrapped, DiffusionDenoiseVectorEnv)
        observation, info = envs.reset(seed=0)
        assert envs.observation_space.contains(observation)
        for action in (CONTINUE, REFINE, STOP):
            observation, reward, terminated, truncated, info = envs.step(np.full(2, action))
        assert terminated.all() and np.isfinite(reward).all()
        for conforms in (check_env, sb3_check_env):
            conforms(gym.make(env_id, **settings).unwrapped)
    spec = gym.spec(env_id)
    assert gym.envs.registration.EnvSpec.from_json(spec.to_json()) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert envs.unwrapped.config.solver == addiff_env.PRESETS[env_id].get("solver", "ddim")


def test_sd15s_observation_is_1672_wide(tiny_kwargs: Kwargs, folders: dict[str, Path], tmp_path: Path) -> None:
    """768 + 768 + 128 + 8 with a CLIP of ViT-L/14's embedding, through open_clip as the id has it."""
    vision = {"image_size": 224, "layers": 1, "width": 32, "head_width": 16, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}
    config = {"embed_dim": 768, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(open_clip.CLIP(**config).state_dict(), tmp_path / "open_clip_model.safetensors")
    local = {name: addiff_env.TINY[name] for name in ("dino", "scorer", "prompts")} | tiny_kwargs
    local |= {"model": str(folders["sd"]), "clip": f"open_clip:local-dir:{tmp_path}", "device": "cpu"}
    small = {"height": 64, "width": 64, "attention_stride": 2, "preview": "latent_rgb", "num_inference_steps": 4}
    env = gym.make("AdDiffusion-SD15-v0", **{**local, **small})
    observation, _ = env.reset(seed=0)
    assert env.observation_space.shape == observation.shape == (1672,) and env.observation_space.contains(observation)


def test_missing_hub_models_say_what_to_do(tiny_kwargs: Kwargs) -> None:
    local = {name: addiff_env.TINY[name] for name in ("clip", "dino", "scorer")} | tiny_kwargs
    local.pop("model", None)
    with pytest.raises(FileNotFoundError, match="stable-diffusion-v1-5.*download it, or pass model="):
        gym.make("AdDiffusion-SD15-v0", **local)
