"""diffusers' pipelines as methods: what they change, what they cost, and that they start from the same noise."""

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    StableDiffusionAttendAndExcitePipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from gymnasium.vector import AutoresetMode
from models import save, with_scheduler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from addiff_env.diffusion.backbones import to_uint8
from addiff_env.env import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.diffusers_methods import (
    AttendAndExcite,
    DiffusersSolver,
    MethodOptions,
    SelfAttentionGuidance,
    _AttendAndExcite,
    noun_tokens,
)
from addiff_env.evaluation.methods.registry import make_method
from addiff_env.types import Generated

ITEMS = [Item("a red circle", 3, "colors"), Item("a star above a green ring", 4, "position")]


def make_env(kwargs: dict[str, Any], **more: Any) -> DiffusionDenoiseVectorEnv:
    made = gym.make_vec("AdDiffusion-Tiny-v0", 2, autoreset_mode=AutoresetMode.DISABLED, **kwargs | more).unwrapped
    assert isinstance(made, DiffusionDenoiseVectorEnv)
    return made


@pytest.fixture(scope="module")
def env(small_kwargs: dict[str, Any]) -> DiffusionDenoiseVectorEnv:
    return make_env(small_kwargs)


def made_by(method: Any, items: list[Item] = ITEMS) -> list[Generated]:
    made = {item.seed: result for group in method.make(list(items)) for item, result in group}
    return [made[item.seed] for item in items]


def difference(one: list[Generated], other: list[Generated]) -> float:
    """The mean absolute difference of the pictures, in 255ths."""
    pairs = zip(one, other, strict=True)
    return float(np.mean([np.abs(a.picture.astype(int) - b.picture.astype(int)).mean() for a, b in pairs]))


# --------------------------------------------------------------------------- guidance by attention


def test_sag_alters_what_ddim_draws(env: DiffusionDenoiseVectorEnv) -> None:
    plain = made_by(make_method("ddim-5", env))
    processors = {name: type(p) for name, p in env.backbone.unet.attn_processors.items()}
    guided = made_by(make_method("sag-5", env))
    assert {name: type(p) for name, p in env.backbone.unet.attn_processors.items()} == processors
    assert difference(made_by(SelfAttentionGuidance(env, 5, scale=0.0)), plain) < 0.01  # off it is DDIM
    assert difference(guided, plain) > 0.1
    assert [(r.nfe, r.forward_passes) for r in guided] == [(10, 15)] * 2
    assert guided[0].net_flops - plain[0].net_flops == pytest.approx(5 * env.flops_per_call["denoiser"])


class Unexcited(AttendAndExcite):
    """The pipeline with nothing demanded."""

    def _arguments(self, items: list[Item]) -> dict[str, Any]:
        return super()._arguments(items) | {"max_iter_to_alter": 0, "thresholds": {}}


def test_attend_and_excite_alters_what_ddim_draws(env: DiffusionDenoiseVectorEnv) -> None:
    plain = made_by(make_method("ddim-6", env))
    method = make_method("attend-and-excite-6", env)
    assert isinstance(method, AttendAndExcite)
    excited = made_by(method)
    assert difference(made_by(Unexcited(env, 6)), plain) < 0.01
    assert difference(excited, plain) > 0.1
    assert all(r.nfe >= 12 and r.forward_passes == r.nfe + 6 for r in excited)  # 6 pairs, the rest alone
    gradients = method.pipeline.gradients  # of the last picture
    assert gradients >= 3
    spent = excited[-1].net_flops - plain[-1].net_flops
    extra = (excited[-1].forward_passes - 12) * env.flops_per_call[
        "denoiser"
    ] + gradients * method.pipeline.gradient_flops
    assert spent == pytest.approx(extra)


def test_a_blank_caption_is_plain_ddim_with_a_note(env: DiffusionDenoiseVectorEnv) -> None:
    blank = [Item("", 5, "blank"), *ITEMS]
    plain, excited = (made_by(make_method(f"{name}-4", env), blank) for name in ("ddim", "attend-and-excite"))
    assert difference(excited[:1], plain[:1]) < 0.01 and excited[0].nfe == 4
    assert "plain DDIM" in excited[0].note and not excited[1].note
    assert excited[0].net_flops == pytest.approx(plain[0].net_flops)


class Everything(TorchDispatchMode):
    """Counts the FLOPs of whatever runs, forward or backward."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def test_attend_and_excites_gradients_are_in_its_flops(env: DiffusionDenoiseVectorEnv) -> None:
    (first,) = made_by(make_method("attend-and-excite-4", env), ITEMS[:1])
    method = make_method("attend-and-excite-4", env)
    assert isinstance(method, AttendAndExcite)
    method.pipeline.gradient_flops = 0.0  # leaves the measuring to the counter around everything
    with sdpa_kernel(SDPBackend.MATH), Everything() as counter:
        (again,) = made_by(method, ITEMS[:1])
    text, look = env.flops_per_call["text"], env.flops_per_call["denoiser"]
    gradients = method.pipeline.gradients
    counted = counter.total - again.forward_passes * look - env.flops_per_call["decode"] - 2 * text
    ours = first.net_flops - first.forward_passes * look - env.flops_per_call["decode"] - 2 * text
    assert again.forward_passes == first.forward_passes
    assert ours == pytest.approx(counted, rel=0.02) and ours > 0.5 * gradients * look


def test_the_excited_peaks_are_diffusers(rng: np.random.Generator) -> None:
    maps = torch.from_numpy(rng.random((8, 8, 12))).float()
    ours = _AttendAndExcite._compute_max_attention_per_index(maps.clone(), [2, 5])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.meshgrid in diffusers
        theirs = StableDiffusionAttendAndExcitePipeline._compute_max_attention_per_index(maps.clone(), [2, 5])
    assert torch.allclose(torch.stack(ours), torch.stack(theirs), atol=1e-6)


def test_nouns_are_excited(env: DiffusionDenoiseVectorEnv) -> None:
    tokenizer = env.backbone.tokenizer
    for prompt, nouns in (
        ("a red circle", ["circle"]),
        ("a star above a green ring", ["star", "ring"]),
        ("two blue squares", ["squares"]),
        ("red", ["red"]),
        ("a photo of a red circle", ["circle"]),  # the medium is no thing in the picture ...
        ("a circle and a photo", ["circle", "photo"]),
        ("a picture of", ["picture"]),  # ... unless there is no other
    ):
        ids = tokenizer(prompt).input_ids
        found = [tokenizer.decode([ids[index]]).strip() for index in noun_tokens(tokenizer, prompt)]
        assert found == nouns or all(noun.endswith(piece) for noun, piece in zip(nouns, found, strict=True))
    assert max(noun_tokens(tokenizer, "a circle and " * 200)) <= tokenizer.model_max_length - 2
    with pytest.raises(ValueError, match="a word to excite, got the prompt ''"):
        noun_tokens(tokenizer, "")


def test_the_embedded_worlds_model_can_be_excited_in_its_own_dtype(tiny_kwargs: dict[str, Any]) -> None:
    world = make_env(tiny_kwargs, dtype="bfloat16")
    plain = made_by(make_method("ddim-2", world), ITEMS[1:])
    assert difference(made_by(make_method("attend-and-excite-2", world), ITEMS[1:]), plain) > 0.1
    assert difference(made_by(make_method("sag-2", world), ITEMS[1:]), plain) > 0.1


@pytest.mark.parametrize("spec", ["sag-4", "attend-and-excite-4"])
def test_pipelines_for_another_kind_of_model_are_refused(
    spec: str, tiny_kwargs: dict[str, Any], xl_folder: Path
) -> None:
    with pytest.raises(ValueError, match="needs a StableDiffusionPipeline"):
        make_method(spec, make_env(tiny_kwargs, model=str(xl_folder), attention_stride=2, dtype="float32"))


# --------------------------------------------------------------------------- distilled models


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("sdxl", tmp_path_factory.mktemp("xl") / "pipeline")


def save_lora(pipeline: Any, folder: Path) -> Path:
    """A LoRA with seeded weights for a pipeline's attention, as diffusers' files hold one."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_v"])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipeline.unet.add_adapter(config)
    type(pipeline).save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    return folder / "pytorch_lora_weights.safetensors"


def test_lcm_is_diffusers_with_the_lora(small_model: Path, env: DiffusionDenoiseVectorEnv, tmp_path: Path) -> None:
    lora = save_lora(StableDiffusionPipeline.from_pretrained(small_model, safety_checker=None), tmp_path)
    method = make_method("lcm-3", env, options=MethodOptions(lcm_lora=str(lora)))
    made = made_by(method)
    assert [(r.nfe, r.forward_passes) for r in made] == [(3, 3)] * 2 and str(lora) in method.solver
    reference = StableDiffusionPipeline.from_pretrained(small_model, safety_checker=None)
    reference.load_lora_weights(lora)
    reference.scheduler = LCMScheduler.from_config(reference.scheduler.config)
    reference.set_progress_bar_config(disable=True)
    for item, result in zip(ITEMS, made, strict=True):
        generator = torch.Generator().manual_seed(item.seed)
        kwargs = {"num_inference_steps": 3, "guidance_scale": 1.0, "height": 64, "width": 64}
        picture = reference(item.prompt, generator=generator, output_type="pt", **kwargs).images
        assert np.abs(to_uint8(picture)[0].astype(int) - result.picture).max() <= 1
    without = made_by(DiffusersSolver(env, "plain", 3, LCMScheduler, guidance_scale=1.0))
    assert difference(made, without) > 0.1  # the LoRA does something, and not to the environment's own model


def test_lcm_without_its_lora_says_what_to_get(env: DiffusionDenoiseVectorEnv) -> None:
    with pytest.raises(FileNotFoundError, match="latent-consistency/lcm-lora-sdv1-5.*method_options.lcm_lora"):
        make_method("lcm-4", env, options=MethodOptions(lcm_lora="/nowhere/lora.safetensors"))
    with pytest.raises(ValueError, match="'lora'; known: lcm_lora, lcm_guidance, sdxl_turbo"):
        MethodOptions.read({"lora": "x"})


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' own, under NumPy 2
def test_sdxl_turbo_is_diffusers_with_its_own_scheduler(
    env: DiffusionDenoiseVectorEnv, xl_folder: Path, tmp_path: Path
) -> None:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **betas)
    turbo = with_scheduler(xl_folder, scheduler, tmp_path / "turbo")
    method = make_method("sdxl-turbo-2", env, options=MethodOptions(sdxl_turbo=str(turbo)))
    made = made_by(method)
    assert [(r.nfe, r.forward_passes) for r in made] == [(2, 2)] * 2
    assert method.backbone.name == str(turbo) != env.backbone.name
    reference = StableDiffusionXLPipeline.from_pretrained(turbo, add_watermarker=False)
    reference.set_progress_bar_config(disable=True)
    for item, result in zip(ITEMS, made, strict=True):
        generator = torch.Generator().manual_seed(item.seed)
        picture = reference(
            item.prompt, num_inference_steps=2, guidance_scale=0.0, generator=generator, output_type="pt"
        )
        assert np.abs(to_uint8(picture.images)[0].astype(int) - result.picture).max() <= 1
    alone = made_by(method, ITEMS[1:])
    assert difference(made[1:], alone) < 0.5  # its noise comes from its own generator, whatever travels with it
    with pytest.raises(FileNotFoundError, match="/nowhere.*get stabilityai/sdxl-turbo and set"):
        make_method("sdxl-turbo-1", env, options=MethodOptions(sdxl_turbo="/nowhere"))


def test_solvers_run_sdxl_too(tiny_kwargs: dict[str, Any], xl_folder: Path) -> None:
    more = {"model": str(xl_folder), "attention_stride": 2, "dtype": "float32", "num_inference_steps": 4, "max_nfe": 8}
    xl = make_env(tiny_kwargs, warmup_steps=1, **more)
    ours, theirs = (made_by(m) for m in (make_method("ddim-4", xl), DiffusersSolver(xl, "ddim", 4, DDIMScheduler)))
    assert difference(ours, theirs) < 0.05
    assert [r.net_flops for r in ours] == pytest.approx([r.net_flops for r in theirs])
