"""All-continue episodes against diffusers' own pipelines, over solvers and options; float32 throughout.

Latents are of ordinary size (`models.denoiser_like`) and may differ by 1e-5 of their size (`rounding`). diffusers' own
pipelines, at 1 to 50 steps, differ from themselves by up to 6e-6 of it with one prompt a batch instead of two. In
another memory layout it is up to 4e-6 with AVX-512 and 1.6e-5 with AVX2, so that the reference is laid out as ours.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import models
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from gymnasium.vector import AutoresetMode
from rounding import assert_same_but_for_rounding

import addiff_env
from addiff_env.diffusion.samplers import SOLVERS, Level, Schedule, solver_step
from addiff_env.env import DiffusionDenoiseVectorEnv
from addiff_env.loading.paths import resolve_model
from addiff_env.perception.encoders import load_clip, load_dino
from addiff_env.perception.scorers import load_scorer

PROMPTS, SEEDS = ["a red circle", "two blue squares and a star"], [3, 4]
STEPS = [1, 4, 10, 50]
SPACINGS = ["leading", "linspace", "trailing"]
Kwargs = dict[str, Any]

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' own, under NumPy 2


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("backbones")
    made = {kind: models.save(kind, root / kind) for kind in models.BUILDERS}
    for prediction in ("v_prediction", "sample"):
        made[f"sd-{prediction}"] = models.save("sd", root / f"sd-{prediction}", prediction_type=prediction)
    made["sd-epsilon"] = made["sd"]
    made["sdxl-empty"] = models.save("sdxl", root / "sdxl-empty", force_zeros=False)
    made["flux-dev"] = models.save("flux", root / "flux-dev", guidance_embeds=True)
    return made


@pytest.fixture(scope="session")
def tiny_kwargs(tiny_kwargs: Kwargs, small_looks: dict[str, str]) -> Kwargs:
    """Looks have no part in what is compared here."""
    return {**tiny_kwargs, **small_looks}


@pytest.fixture(scope="session", autouse=True)
def looking(tiny_kwargs: Kwargs) -> tuple[Any, ...]:
    """The encoders and the scorer, held so that they are loaded once for the whole page."""
    models = {**addiff_env.TINY, **tiny_kwargs}
    loaders = (("clip", load_clip), ("dino", load_dino), ("scorer", load_scorer))
    return tuple(load(resolve_model(models[name]), "cpu") for name, load in loaders)


def make(tiny_kwargs: Kwargs, folder: Path, number: int, **more: Any) -> DiffusionDenoiseVectorEnv:
    settings = {
        "model": str(folder),
        "dtype": "float32",
        "num_inference_steps": number,
        "warmup_steps": min(2, number - 1),
        "max_nfe": 2 * number,
        "observe_every": 1000,
        "guidance_scale": 4.0,
        **more,
    }
    envs = gym.make_vec(
        "AdDiffusion-Tiny-v0", 2, autoreset_mode=AutoresetMode.DISABLED, **{**tiny_kwargs, **settings}
    ).unwrapped
    assert isinstance(envs, DiffusionDenoiseVectorEnv)
    return envs


def encoded_one_by_one(pipeline: Any) -> Kwargs:
    """SDXL's conditioning by its pipeline's own encoder, a prompt at a time, as a lane's must not know its neighbours.

    In a batch of two its pooled embedding has other last digits (4e-7), which epsilon at the noisiest step multiplies
    by guidance and 1 / alpha, fourteenfold: 2.7e-5 in the latents.
    """
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    with torch.no_grad():
        rows = [pipeline.encode_prompt(prompt, do_classifier_free_guidance=True) for prompt in PROMPTS]
    return {name: torch.cat(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def reference(
    envs: DiffusionDenoiseVectorEnv,
    folder: Path,
    scheduler: Any = None,
    unet: Any = None,
    lanes: slice = slice(None),
    layout: torch.memory_format = torch.channels_last,  # as in the environment
    **call: Any,
) -> torch.Tensor:
    """The latents (B, C, h, w) of diffusers' pipeline for some of the lanes of ``envs``."""
    c = envs.config
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipeline.scheduler = scheduler
    if unet is not None:
        pipeline.unet = unet
    if hasattr(pipeline, "unet"):
        pipeline.unet.to(memory_format=layout)
    prompts = {"prompt": PROMPTS} if "XL" not in type(pipeline).__name__ else encoded_one_by_one(pipeline)
    latents = pipeline(
        **{name: rows[lanes] for name, rows in prompts.items()},
        num_inference_steps=c.num_inference_steps,
        guidance_scale=c.guidance_scale,
        height=c.height,
        width=c.width,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS[lanes]],
        output_type="latent",
        **call,
    ).images
    if "Flux" in type(pipeline).__name__:
        latents = pipeline._unpack_latents(latents, c.height, c.width, pipeline.vae_scale_factor)
    return latents


def is_same_but_for_rounding(latents: torch.Tensor, expected: torch.Tensor) -> bool:
    try:
        assert_same_but_for_rounding(latents, expected)
    except AssertionError:
        return False
    return True


def roll_out(envs: DiffusionDenoiseVectorEnv) -> torch.Tensor:
    """The final latents (B, C, h, w) of all-continue episodes."""
    envs.reset(options={"prompt": PROMPTS, "seed": SEEDS})
    while not envs.done.all():
        envs.step(np.zeros(2, int))
    return envs.latents.clone()


def assert_parity(envs: DiffusionDenoiseVectorEnv, folder: Path, *args: Any, **kwargs: Any) -> None:
    """Whether ``envs`` end with the latents of `reference`, which takes the other arguments."""
    latents = roll_out(envs)
    expected = reference(envs, folder, *args, **kwargs)
    assert torch.isfinite(expected).all() and 0.05 < expected.std() < 3
    assert_same_but_for_rounding(latents, expected)
    assert envs.nfe.tolist() == [envs.config.num_inference_steps] * 2


# ------------------------------------------------------------------ the bar itself

KARRAS = {**models.BETAS, "steps_offset": 1, "prediction_type": "v_prediction", "use_karras_sigmas": True}
FLUX_CALL = {"max_sequence_length": 256}
# Every solver with each option that has coefficients of its own: model, scheduler, settings, what diffusers is told.
# DPM-Solver's history weighs most with Karras levels and v.
SOLVER_RUNS: dict[str, tuple[str, Any, Kwargs, Kwargs]] = {
    "ddim": ("sd", DDIMScheduler(**models.DDIM), {}, {}),
    "ddim with noise": ("sd", DDIMScheduler(**models.DDIM), {"eta": 0.5}, {"eta": 0.5}),
    "dpmpp_2m": ("sd-v_prediction", DPMSolverMultistepScheduler(**KARRAS), {}, {}),
    "dpmpp_2m heun": ("sd-v_prediction", DPMSolverMultistepScheduler(**KARRAS, solver_type="heun"), {}, {}),
    "euler": ("flux", FlowMatchEulerDiscreteScheduler(), {"guidance_scale": 0.0}, FLUX_CALL),
}
NUDGE = 1 + 1e-4


@pytest.fixture(params=SOLVER_RUNS)
def solver_run(
    request: pytest.FixtureRequest, tiny_kwargs: Kwargs, folders: dict[str, Path], tmp_path: Path
) -> tuple[DiffusionDenoiseVectorEnv, Path, Kwargs]:
    kind, scheduler, settings, call = SOLVER_RUNS[request.param]
    folder = models.with_scheduler(folders[kind], scheduler, tmp_path / "model")
    return make(tiny_kwargs, folder, 4, solver=request.param.split()[0], **settings), folder, call


def with_level_nudged(schedule: Schedule, side: str, name: str, step: int) -> Schedule:
    levels = getattr(schedule, side)
    values = getattr(levels, name).clone()
    values[step] *= NUDGE
    return replace(schedule, **{side: levels._replace(**{name: values})})


def with_history_nudged(
    schedule: Schedule, latents: torch.Tensor, x0: torch.Tensor, at: torch.Tensor, before: torch.Tensor, *rest: Any
) -> torch.Tensor:
    """`solver_step` with the coefficient of a multistep solver's correction off."""
    return solver_step(schedule, latents, x0, at, x0 + NUDGE * (before - x0), *rest)


def test_the_bar_is_tried_on_every_solver() -> None:
    assert {name.split()[0] for name in SOLVER_RUNS} == set(SOLVERS)


def test_diffusers_differs_from_itself_by_less_than_the_bar(
    solver_run: tuple[DiffusionDenoiseVectorEnv, Path, Kwargs],
) -> None:
    envs, folder, call = solver_run
    expected = reference(envs, folder, **call)
    alone = [reference(envs, folder, lanes=slice(lane, lane + 1), **call) for lane in range(2)]
    assert_same_but_for_rounding(torch.cat(alone), expected)
    assert_same_but_for_rounding(reference(envs, folder, layout=torch.contiguous_format, **call), expected)


@pytest.mark.parametrize("solver_run", ["ddim", "euler"], indirect=True)
def test_diffusers_on_more_threads_differs_from_itself_by_less_than_the_bar(
    solver_run: tuple[DiffusionDenoiseVectorEnv, Path, Kwargs],
) -> None:
    envs, folder, call = solver_run
    expected, threads = reference(envs, folder, **call), torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert_same_but_for_rounding(reference(envs, folder, **call), expected)
    finally:
        torch.set_num_threads(threads)


def test_the_bar_tells_a_wrong_coefficient(
    solver_run: tuple[DiffusionDenoiseVectorEnv, Path, Kwargs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One coefficient, wrong by 1e-4 of its value: of the second step of four, or of the solver."""
    envs, folder, call = solver_run
    expected, right = reference(envs, folder, **call), envs.schedule
    assert_same_but_for_rounding(roll_out(envs), expected)
    wrong = {
        f"{side}.{name}": with_level_nudged(right, side, name, 1)
        for side in ("current", "next")
        for name in Level._fields
    }
    if right.eta:
        wrong["eta"] = replace(right, eta=NUDGE * right.eta)
    missed = []
    for name, envs.denoiser.schedule in wrong.items():
        if is_same_but_for_rounding(roll_out(envs), expected):
            missed.append(name)
    envs.denoiser.schedule = right
    if right.multistep:
        monkeypatch.setattr("addiff_env.env.denoiser.solver_step", with_history_nudged)
        if is_same_but_for_rounding(roll_out(envs), expected):
            missed.append("history")
    assert not missed


# ------------------------------------------------------------------ Stable Diffusion


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("number", STEPS)
def test_sd_ddim(
    tiny_kwargs: Kwargs, folders: dict[str, Path], tmp_path: Path, number: int, spacing: str, prediction: str
) -> None:
    scheduler = DDIMScheduler(**models.DDIM, timestep_spacing=spacing, prediction_type=prediction)
    folder = models.with_scheduler(folders[f"sd-{prediction}"], scheduler, tmp_path / "model")
    assert_parity(make(tiny_kwargs, folder, number), folder)


@pytest.mark.parametrize(
    "more",
    [
        {"set_alpha_to_one": False},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    ],
    ids=str,
)
@pytest.mark.parametrize("number", STEPS)
def test_sd_ddim_options(
    tiny_kwargs: Kwargs, folders: dict[str, Path], tmp_path: Path, number: int, more: Kwargs
) -> None:
    source = folders[f"sd-{more.get('prediction_type', 'epsilon')}"]
    folder = models.with_scheduler(source, DDIMScheduler(**{**models.DDIM, **more}), tmp_path / "model")
    assert_parity(make(tiny_kwargs, folder, number), folder)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("number", STEPS)
def test_sd_ddim_with_noise(tiny_kwargs: Kwargs, folders: dict[str, Path], number: int, eta: float) -> None:
    assert_parity(make(tiny_kwargs, folders["sd"], number, eta=eta), folders["sd"], eta=eta)


def test_the_small_models_listen_to_their_prompts(tiny_kwargs: Kwargs, folders: dict[str, Path]) -> None:
    """Otherwise wrong conditioning or guidance would pass for parity."""
    for kind, solver, scale in (("sd", "ddim", 4.0), ("sdxl", "ddim", 4.0), ("flux", "euler", 0.0)):
        envs = make(tiny_kwargs, folders[kind], 4, solver=solver, guidance_scale=scale)
        envs.reset(options={"prompt": PROMPTS, "seed": [3, 3]})
        while not envs.done.all():
            envs.step(np.zeros(2, int))
        assert (envs.latents[0] - envs.latents[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
        {"use_karras_sigmas": True},
        {"solver_type": "heun"},
        {"final_sigmas_type": "sigma_min"},
        {"euler_at_final": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("number", STEPS)
def test_sd_dpm_solver(
    tiny_kwargs: Kwargs, folders: dict[str, Path], tmp_path: Path, number: int, spacing: str, more: Kwargs
) -> None:
    scheduler = DPMSolverMultistepScheduler(**{**models.BETAS, "steps_offset": 1, "timestep_spacing": spacing, **more})
    source = folders[f"sd-{more.get('prediction_type', 'epsilon')}"]
    folder = models.with_scheduler(source, scheduler, tmp_path / "model")
    assert_parity(make(tiny_kwargs, folder, number, solver="dpmpp_2m"), folder)


def test_another_solver_keeps_the_models_schedule(tiny_kwargs: Kwargs, folders: dict[str, Path]) -> None:
    """What the folder's DDIM configuration leaves out is DPM-Solver's own default, as with diffusers' from_config."""
    envs = make(tiny_kwargs, folders["sd"], 10, solver="dpmpp_2m")
    config = DDIMScheduler.from_pretrained(folders["sd"], subfolder="scheduler").config
    assert_parity(envs, folders["sd"], DPMSolverMultistepScheduler.from_config(config))


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_sd_without_guidance(tiny_kwargs: Kwargs, folders: dict[str, Path], scale: float) -> None:
    envs = make(tiny_kwargs, folders["sd"], 4, guidance_scale=scale)
    assert envs.passes_per_nfe == 1
    assert_parity(envs, folders["sd"])


def test_sd_pictures_that_are_not_square(tiny_kwargs: Kwargs, folders: dict[str, Path]) -> None:
    assert_parity(make(tiny_kwargs, folders["sd"], 4, height=48, width=80), folders["sd"])


def save_lora(folder: Path, target: Path) -> Path:
    """A LoRA with random weights, big enough to be seen, as diffusers saves it."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
        for name, parameter in pipeline.unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    pipeline.save_lora_weights(target, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    return target


def test_a_lora_is_fused(tiny_kwargs: Kwargs, folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = save_lora(folders["sd"], tmp_path / "lora")
    envs, plain = make(tiny_kwargs, folders["sd"], 4, lora=str(lora)), make(tiny_kwargs, folders["sd"], 4)
    assert envs.backbone is not plain.backbone
    pipeline = DiffusionPipeline.from_pretrained(folders["sd"], use_safetensors=True)
    pipeline.load_lora_weights(lora)  # not fused: the reference adds it at every call
    assert_parity(envs, folders["sd"], unet=pipeline.unet)
    with pytest.raises(AssertionError):
        assert_parity(plain, folders["sd"], unet=pipeline.unet)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the compiler
def test_a_compiled_model_is_the_same(tiny_kwargs: Kwargs, folders: dict[str, Path]) -> None:
    envs = make(tiny_kwargs, folders["sd"], 4, compile=True, channels_last=False)
    assert_parity(envs, folders["sd"])


# ------------------------------------------------------------------ SDXL


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", ["sdxl", "sdxl-empty"])
@pytest.mark.parametrize("number", STEPS)
def test_sdxl_ddim(
    tiny_kwargs: Kwargs, folders: dict[str, Path], tmp_path: Path, number: int, kind: str, spacing: str
) -> None:
    scheduler = DDIMScheduler(**{**models.DDIM, "steps_offset": 0, "timestep_spacing": spacing})
    folder = models.with_scheduler(folders[kind], scheduler, tmp_path / "model")
    assert_parity(make(tiny_kwargs, folder, number), folder)


@pytest.mark.parametrize("number", STEPS)
def test_sdxl_dpm_solver(tiny_kwargs: Kwargs, folders: dict[str, Path], tmp_path: Path, number: int) -> None:
    scheduler = DPMSolverMultistepScheduler(**models.BETAS, use_karras_sigmas=True, timestep_spacing="trailing")
    folder = models.with_scheduler(folders["sdxl"], scheduler, tmp_path / "model")
    assert_parity(make(tiny_kwargs, folder, number, solver="dpmpp_2m"), folder)


def test_sdxl_pictures_that_are_not_square(tiny_kwargs: Kwargs, folders: dict[str, Path]) -> None:
    assert_parity(make(tiny_kwargs, folders["sdxl"], 4, height=48, width=80), folders["sdxl"])


# ------------------------------------------------------------------ Flux


@pytest.mark.parametrize(
    "more",
    [
        {"shift": 1.0},
        {"shift": 3.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    ],
    ids=str,
)
@pytest.mark.parametrize("number", STEPS)
def test_flux(tiny_kwargs: Kwargs, folders: dict[str, Path], tmp_path: Path, number: int, more: Kwargs) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**more)
    folder = models.with_scheduler(folders["flux"], scheduler, tmp_path / "model")
    envs = make(tiny_kwargs, folder, number, solver="euler", guidance_scale=0.0)
    assert_parity(envs, folder, max_sequence_length=256)


def test_flux_with_distilled_guidance(tiny_kwargs: Kwargs, folders: dict[str, Path]) -> None:
    envs = make(tiny_kwargs, folders["flux-dev"], 4, solver="euler", guidance_scale=3.5, height=48, width=80)
    assert envs.passes_per_nfe == 1
    assert_parity(envs, folders["flux-dev"])
