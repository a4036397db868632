"""Methods that are pipelines of diffusers: other solvers, guidance by attention, distilled models.

All of them start from the noise that the environment's own methods start from, wherever the latents have the same
shape, and their networks' calls are counted as they happen: a call is one NFE of each lane in it, a lane in a call is
one forward pass. Gradients are no NFE; they are in the net FLOPs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionAttendAndExcitePipeline,
    StableDiffusionPipeline,
    StableDiffusionSAGPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from torch.utils.flop_counter import FlopCounterMode

from addiff_env.diffusion.backbones import (
    Backbone,
    StableDiffusionBackbone,
    decode_finite,
    draw_noise,
    load_backbone,
    to_uint8,
)
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.base import NOT_FINITE, Batched
from addiff_env.evaluation.metrics.phrases import NounPhrase, noun_phrases
from addiff_env.loading.isolation import frozen, isolated
from addiff_env.types import Generated

SCHEDULERS = {"euler": EulerDiscreteScheduler, "unipc": UniPCMultistepScheduler, "pndm": PNDMScheduler}
PLMS = {"skip_prk_steps": True}  # as Stable Diffusion uses PNDM: N + 1 evaluations, no Runge-Kutta start
LCM_LORAS = {False: "latent-consistency/lcm-lora-sdv1-5", True: "latent-consistency/lcm-lora-sdxl"}  # by whether XL


@dataclass(frozen=True)
class MethodOptions:
    """Settings of methods that need further weights; all JSON-able."""

    lcm_lora: str | None = None  # of lcm-N: Hub id or .safetensors file; None: the published one of the model's kind
    lcm_guidance: float = 1.0  # LCM-LoRA is meant for 1 (no guidance) to 2
    sdxl_turbo: str = "stabilityai/sdxl-turbo"  # of sdxl-turbo-N: Hub id or pipeline folder

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> MethodOptions:
        """From a configuration's values; raises ValueError for an unknown name."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"unknown method option {name!r}; known: {', '.join(known)}")
        return cls(**values)


class DiffusersSolver(Batched):
    """diffusers' own pipeline with another scheduler on the parts of a loaded model.

    Args:
        env: whose noise, size, guidance and (unless ``backbone`` is given) model are used.
        name: of the method, without the number of steps.
        steps: solver steps.
        scheduler: a class of diffusers; its configuration is the model's own.
        pipeline: a class of diffusers, by default the plain one of the model's kind.
        batch_size: pictures at a time; None: the environment's.
        backbone: another model than the environment's.
        guidance_scale: another one than the environment's.
        size: height and width of the pictures, pixels, where not the environment's.

    Raises:
        ValueError: the model is of a kind that the pipeline cannot run.
    """

    def __init__(
        self,
        env: DiffusionDenoiseVectorEnv,
        name: str,
        steps: int,
        scheduler: Any,
        pipeline: Any = None,
        batch_size: int | None = None,
        *,
        backbone: Backbone | None = None,
        guidance_scale: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(env, f"{name}-{steps}", batch_size)
        if steps < 1:
            raise ValueError(f"{self.name} has no step")
        self.steps, self.backbone = steps, backbone or env.backbone
        self.expected_nfe = float(steps)
        self.size = size or (env.config.height, env.config.width)
        self.shape = self.backbone.latent_shape(*self.size)
        self.guidance_scale = env.config.guidance_scale if guidance_scale is None else guidance_scale
        guided = self.backbone.passes(self.guidance_scale) == 2
        self.negative_prompt = env.config.negative_prompt if guided else None
        self.pipeline = make_pipeline(self.backbone, scheduler, pipeline, self.name)

    def _arguments(self, items: list[Item]) -> dict[str, Any]:
        """Further arguments of the pipeline's call."""
        return {}

    def _batch(self, items: list[Item]) -> list[Generated]:
        generators = [torch.Generator().manual_seed(int(item.seed)) for item in items]
        noise = draw_noise(self.backbone, self.shape, generators)
        network = self.pipeline.unet
        with frozen(self.backbone), _counted(network) as rows, _processors_kept(network):
            latents = self.pipeline(
                [item.prompt for item in items],
                num_inference_steps=self.steps,
                guidance_scale=self.guidance_scale,
                height=self.size[0],
                width=self.size[1],
                latents=noise,
                negative_prompt=None if self.negative_prompt is None else [self.negative_prompt] * len(items),
                generator=generators,  # goes on behind the initial noise, for solvers that draw more
                output_type="latent",
                **self._arguments(items),
            ).images
        pictures, finite = decode_finite(self.backbone, latents)
        passes = sum(rows) // len(items)
        made = zip(items, to_uint8(pictures), finite.tolist(), strict=True)
        return [self._result(item, picture, len(rows), passes, is_finite) for item, picture, is_finite in made]

    def _result(self, item: Item, picture: Any, nfe: int, passes: int, is_finite: bool) -> Generated:
        backbone = self.backbone
        texts = backbone.texts_encoded(self.guidance_scale, self.negative_prompt)
        prices = {name: backbone.flops(name, self.shape) for name in ("denoiser", "decode", "text")}
        flops = passes * prices["denoiser"] + prices["decode"] + texts * prices["text"] + self._further_flops()
        note = "" if is_finite else NOT_FINITE
        return Generated(item.prompt, item.seed, picture, [], nfe, passes, flops, note=note)

    def _further_flops(self) -> float:
        """Spent on each lane of the latest batch beside forward passes, decode and text."""
        return 0.0


@isolated()
def make_pipeline(backbone: Backbone, scheduler: Any, pipeline: Any, name: str) -> Any:
    """A pipeline of diffusers on a backbone's networks.

    Raises:
        ValueError: the pipeline cannot run a model of this kind; the message names both.
    """
    special = pipeline is not None
    if not isinstance(backbone, StableDiffusionBackbone) or (special and backbone.is_xl):
        kind = "StableDiffusionPipeline" if special else "StableDiffusionPipeline or StableDiffusionXLPipeline"
        raise ValueError(f"{name} needs a {kind}, {backbone.name!r} is none")
    options = PLMS if scheduler is PNDMScheduler else {}
    made = scheduler.from_config({**backbone.scheduler_config, "_class_name": scheduler.__name__}, **options)
    if backbone.is_xl:
        encoders = dict(zip(("text_encoder", "text_encoder_2"), backbone.text_encoders, strict=True))
        tokenizers = dict(zip(("tokenizer", "tokenizer_2"), backbone.tokenizers, strict=True))
        parts = {"vae": backbone.vae, "unet": backbone.unet, "scheduler": made, **encoders, **tokenizers}
        result = StableDiffusionXLPipeline(
            **parts, force_zeros_for_empty_prompt=not backbone.encodes_negative, add_watermarker=False
        )
    else:
        networks = (backbone.vae, backbone.text_encoder, backbone.tokenizer, backbone.unet)
        result = (pipeline or StableDiffusionPipeline)(*networks, made, None, None, requires_safety_checker=False)
    result.set_progress_bar_config(disable=True)
    return result


@contextmanager
def _counted(network: torch.nn.Module) -> Iterator[list[int]]:
    """While the context lasts, the batch size of every call of the network."""
    rows: list[int] = []
    hook = network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        yield rows
    finally:
        hook.remove()


@contextmanager
def _processors_kept(network: Any) -> Iterator[None]:
    """Give the network its attention processors back, also where a pipeline fails that exchanged them."""
    processors = dict(network.attn_processors)
    try:
        yield
    finally:
        network.set_attn_processor(processors)


# --------------------------------------------------------------------------- guidance by attention


class SelfAttentionGuidance(DiffusersSolver):
    """SAG (Hong et al. 2023) at diffusers' scale of 0.75 on DDIM: where self-attention looks, blurred is worse.

    A step is two NFE: the guidance pair, and one evaluation of the blurred latents.
    """

    def __init__(self, env: DiffusionDenoiseVectorEnv, steps: int, scale: float = 0.75) -> None:
        super().__init__(env, "sag", steps, DDIMScheduler, StableDiffusionSAGPipeline)
        self.scale, self.expected_nfe = scale, 2.0 * steps

    def _arguments(self, items: list[Item]) -> dict[str, Any]:
        return {"sag_scale": self.scale}


class _AttendAndExcite(StableDiffusionAttendAndExcitePipeline):
    """diffusers' pipeline, in any dtype, with its gradients' FLOPs counted."""

    gradients = 0
    gradient_flops: float | None = None  # of one gradient; measured once, they all have the same shapes

    @staticmethod
    def _compute_max_attention_per_index(attention_maps: torch.Tensor, indices: list[int]) -> list[torch.Tensor]:
        """The highest value of each chosen token's smoothed map, from maps (h, w, tokens); as diffusers has it."""
        shares = (100 * attention_maps[:, :, 1:-1].float()).softmax(-1)  # without BOS
        chosen = shares[:, :, [index - 1 for index in indices]].permute(2, 0, 1)[:, None]  # (K, 1, h, w)
        edge = torch.tensor([1.0, 0.0, 1.0], device=chosen.device).neg().exp()
        kernel = edge[:, None] * edge  # exp(-(d / 2 sigma)^2), sigma 0.5
        smooth = F.conv2d(F.pad(chosen, (1, 1, 1, 1), mode="reflect"), (kernel / kernel.sum())[None, None])
        return list(smooth.flatten(1).amax(1).unbind())

    def _update_latent(self, latents: torch.Tensor, loss: torch.Tensor, step_size: float) -> torch.Tensor:
        """One gradient step of the latents."""
        self.gradients += 1
        if self.gradient_flops is not None:
            return self._descend(latents, loss, step_size)
        with FlopCounterMode(display=False) as counter:
            latents = self._descend(latents, loss, step_size)
        self.gradient_flops = float(counter.get_total_flops())
        return latents

    @staticmethod
    def _descend(latents: torch.Tensor, loss: torch.Tensor, step_size: float) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(loss, [latents], retain_graph=True)
        return latents - float(step_size) * gradient


class AttendAndExcite(DiffusersSolver):
    """Attend-and-Excite (Chefer et al. 2023) on DDIM: latents follow the gradient of the most neglected noun's peak.

    The tokens are the heads of the prompt's noun phrases (where there is none, all of its own tokens). The published
    schedule is for 50 steps (gradients in the first 25; peaks of .05, .5 and .8 demanded at steps 0, 10 and 20, by at
    most 20 further gradients each); with N steps it is stretched to the same shares. A step takes an evaluation of the
    prompt with its gradient, and then the guidance pair; the demands take more. Pictures are made one at a time, as
    each takes its own number of gradients.
    """

    def __init__(self, env: DiffusionDenoiseVectorEnv, steps: int) -> None:
        super().__init__(env, "attend-and-excite", steps, DDIMScheduler, _AttendAndExcite, batch_size=1)
        self.expected_nfe = 3.0 * steps  # gradients' evaluations included

    def _arguments(self, items: list[Item]) -> dict[str, Any]:
        self.pipeline.gradients = 0
        stride = self.backbone.attention_stride
        demands = {0: 0.05, 10: 0.5, 20: 0.8}
        return {
            "token_indices": [noun_tokens(self.backbone.tokenizer, item.prompt) for item in items],
            "max_iter_to_alter": max(1, self.steps // 2),
            "thresholds": {at * self.steps // 50: peak for at, peak in demands.items()},
            "attn_res": tuple(-(-cells // stride) for cells in self.shape[1:]),
        }

    def _batch(self, items: list[Item]) -> list[Generated]:
        """One picture; that of a blank caption, in which nothing can be excited, by plain DDIM, with a note."""
        with frozen(self.backbone):  # a tokenizer keeps how it pads and cuts from one call to the next
            wordless = not any(self.backbone.tokenizer.tokenize(item.prompt) for item in items)
        if not wordless:
            return super()._batch(items)
        made = DiffusersSolver(self.env, "ddim", self.steps, DDIMScheduler)._batch(items)
        for result in made:
            result.note = "no word to excite: plain DDIM"
        return made

    def _further_flops(self) -> float:
        return self.pipeline.gradients * (self.pipeline.gradient_flops or 0.0)


_MEDIA = frozenset("photo photograph picture image".split())


def noun_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Positions, BOS counted, of the tokens that end the prompt's nouns; all of its own tokens where there is no noun.

    The *photo* of "a photo of a cat" is no thing to be seen in the picture, unless nothing else is.

    Raises:
        ValueError: a prompt without any token.
    """
    last = tokenizer.model_max_length - 2  # what is behind was cut off
    pieces = min(len(tokenizer.tokenize(prompt)), last)
    phrases = noun_phrases(prompt)
    shown = [phrase for phrase in phrases if not _is_medium(prompt, phrase)] or phrases
    ends = [len(tokenizer.tokenize(prompt[: phrase.end])) for phrase in shown]
    found = sorted({end for end in ends if 0 < end <= pieces}) or list(range(1, pieces + 1))
    if not found:
        raise ValueError(f"Attend-and-Excite needs a word to excite, got the prompt {prompt!r}")
    return found


def _is_medium(prompt: str, phrase: NounPhrase) -> bool:
    return phrase.head.lower() in _MEDIA and re.match(r"\s+of\b", prompt[phrase.end :], re.IGNORECASE) is not None


# --------------------------------------------------------------------------- distilled models


def latent_consistency(env: DiffusionDenoiseVectorEnv, steps: int, options: MethodOptions) -> DiffusersSolver:
    """LCM-LoRA (Luo et al. 2023) on a second copy of the environment's model.

    Raises:
        FileNotFoundError: the LoRA is not there; says which one to get. ImportError: peft is not installed.
        ValueError: the environment's model has a LoRA already, or is of another kind, or the file does not fit it.
    """
    config, own = env.config, env.backbone
    if config.lora is not None or not isinstance(own, StableDiffusionBackbone):
        raise ValueError(
            f"lcm-{steps} needs a Stable Diffusion model without a LoRA, got {own.name!r}, {config.lora!r}"
        )
    lora = options.lcm_lora or LCM_LORAS[own.is_xl]
    try:
        backbone = _second_model(env, config.model, config.revision, lora)
    except FileNotFoundError as error:
        hint = f"get the LCM-LoRA of the model, e.g. {LCM_LORAS[own.is_xl]}, and set method_options.lcm_lora to it"
        raise FileNotFoundError(f"{error}; {hint}") from error
    method = DiffusersSolver(env, "lcm", steps, LCMScheduler, backbone=backbone, guidance_scale=options.lcm_guidance)
    method.solver = f"{method.name}, guidance {options.lcm_guidance:g}, LoRA {lora}"
    return method


def sdxl_turbo(env: DiffusionDenoiseVectorEnv, steps: int, options: MethodOptions) -> DiffusersSolver:
    """SDXL-Turbo (Sauer et al. 2023): another model at its own size, with its own scheduler and no guidance.

    Raises:
        FileNotFoundError: the model is not there; says which one to get. ValueError: it is of another kind.
    """
    try:
        backbone = _second_model(env, options.sdxl_turbo, None, None)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; get stabilityai/sdxl-turbo and set method_options.sdxl_turbo to its folder"
        ) from error
    if not isinstance(backbone, StableDiffusionBackbone):
        raise ValueError(f"sdxl-turbo needs a Stable Diffusion model, {options.sdxl_turbo!r} is none")
    side = int(backbone.unet.config.sample_size) * backbone.spatial_factor
    scheduler = getattr(diffusers, backbone.scheduler_config["_class_name"])
    return DiffusersSolver(
        env, "sdxl-turbo", steps, scheduler, backbone=backbone, guidance_scale=0.0, size=(side, side)
    )


def _second_model(env: DiffusionDenoiseVectorEnv, model: str, revision: str | None, lora: str | None) -> Backbone:
    """A further model on the environment's device, in its dtype."""
    own = {"model": model, "revision": revision, "lora": lora, "compile": False}
    place = {"device": str(env.backbone.device), "dtype": env.backbone.dtype_name}
    return load_backbone(**{**env.config.backbone_settings, **own, **place})
