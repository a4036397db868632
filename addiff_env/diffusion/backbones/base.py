"""What an environment needs of a text-to-image model, and what all of them share."""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch

from addiff_env.diffusion.backbones.offload import attach_offload, load_now
from addiff_env.diffusion.backbones.prompt_cache import PromptCache
from addiff_env.diffusion.backbones.types import BackboneOptions, Conditioning, Prediction
from addiff_env.diffusion.samplers import Level, Schedule, make_schedule, solver_step
from addiff_env.loading.flops import count_flops
from addiff_env.loading.isolation import frozen_call, isolated
from addiff_env.loading.memory import activation_ceiling, bytes_per_pixel, in_slices
from addiff_env.loading.weights import DTYPES

_RECOMPILE_LIMIT = 256  # of one function: a network's blocks share their code, and each shape is a graph of its own


class Backbone(ABC):
    """A frozen model; its conventions (prediction type, scaling, packing, guidance) end here.

    Environments share it, also between threads: subclasses set the attributes below and write the methods marked
    abstract, `predict` as a `frozen_call`.
    """

    name: str
    revision: str | None
    device: torch.device
    dtype: torch.dtype
    dtype_name: str
    tokenizer: Any  # whose positions the attention maps have
    scheduler_config: dict[str, Any]  # of the pipeline's folder, without values that are diffusers' own defaults
    latent_channels: int
    spatial_factor: int  # picture pixels per latent cell
    size_multiple: int  # height and width must be divisible by this, pixels
    feature_width: int  # channels of the network's middle
    attention_stride: int  # latent cells per attention cell
    solver: str  # the one used unless another is asked for
    encodes_negative: bool = False  # whether guidance encodes the empty prompt where no negative one is given
    vae: Any  # the autoencoder

    def __init__(self, options: BackboneOptions) -> None:
        self.name, self.revision, self.dtype_name = options.name, options.revision, options.dtype_name
        self.device, self.dtype = torch.device(options.device), DTYPES[options.dtype_name]
        self.attention_stride = options.attention_stride
        self.decode_memory, self.offload = options.decode_memory, options.offload
        self._prompts: PromptCache[Conditioning] = PromptCache(self.device)
        self._warned: set[str] = set()
        self._flops: dict[tuple[Any, ...], float] = {}

    def _frozen(self, module: Any) -> Any:
        """A network that is not trained: on the device, or on the host for as long as it is not called."""
        module = module.eval().requires_grad_(False)
        return module if self.offload != "none" else module.to(self.device)

    def _attach_offload(self, *modules: Any) -> None:
        attach_offload(modules, self.device, self.offload)

    # ----------------------------------------------------------------- shapes, grids

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of a picture's latents.

        Raises:
            ValueError: the size is not divisible by what the model needs.
        """
        if height % self.size_multiple or width % self.size_multiple or min(height, width) < 1:
            raise ValueError(
                f"height and width must be divisible by {self.size_multiple} for {self.name!r}, got {height} x {width}"
            )
        return self.latent_channels, height // self.spatial_factor, width // self.spatial_factor

    def schedule(
        self, num_inference_steps: int, shape: tuple[int, int, int], solver: str | None = None, eta: float = 0.0
    ) -> Schedule:
        """The grid of ``solver`` for latents of ``shape`` (C, h, w); raises as `make_schedule`."""
        tokens = self.image_tokens(shape)
        return make_schedule(
            self.scheduler_config, num_inference_steps, self.device, solver or self.solver, eta, tokens
        )

    def image_tokens(self, shape: tuple[int, int, int]) -> int | None:
        """The transformer's sequence length for latents of ``shape``, where the schedule depends on it."""
        return None

    @abstractmethod
    def passes(self, guidance_scale: float) -> int:
        """Network passes of one evaluation."""

    # ----------------------------------------------------------------- text

    @frozen_call
    def encode_prompts(
        self, prompts: Sequence[str], negative_prompt: str | Sequence[str | None] | None = None
    ) -> Conditioning:
        """Encode texts as the model's pipeline does; what is too long is truncated, with one warning.

        Args:
            prompts: one per lane.
            negative_prompt: what guidance leads away from: one for all lanes, or one per lane; None is what the model's
                pipeline takes where none is given: the empty prompt, or zeros.

        Raises:
            ValueError: the model takes no negative prompt, or there is not one per lane.
        """
        one = negative_prompt is None or isinstance(negative_prompt, str)
        negatives: list[Any] = [negative_prompt] * len(prompts) if one else list(negative_prompt or [])
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts")
        rows = []
        for prompt, text in zip(prompts, negatives, strict=True):
            row = self._encoded(prompt)
            negative = self._negative(text, row)
            rows.append(row if negative is None else with_negative(row, negative))
        return Conditioning.stack(rows)

    def forget_prompts(self) -> None:
        """Encode every text anew from here on, as if none had been seen."""
        self._prompts = PromptCache(self.device)

    def _encoded(self, text: str) -> Conditioning:
        """One text's encoding, without the lane dimension."""
        return self._prompts.get(text, self._encode)

    @abstractmethod
    def _encode(self, text: str) -> Conditioning:
        """One text's embeddings, without the lane dimension and without a negative."""

    def _negative(self, text: str | None, prompt: Conditioning) -> Conditioning | None:
        """The encoding that guidance leads away from in a lane of ``prompt``; None where there is no such thing.

        Raises:
            ValueError: a text for a model without an unconditional pass.
        """
        if text is not None:
            raise ValueError(f"{self.name!r} has no unconditional pass and takes no negative_prompt, got {text!r}")
        return None

    def check_negative_prompt(self, text: str | None, guidance_scale: float) -> None:
        """Refuse a negative prompt that would have no effect.

        Raises:
            ValueError: one for a model, or a ``guidance_scale``, without an unconditional pass.
        """
        if text is not None and self.passes(guidance_scale) == 1:
            raise ValueError(
                f"negative_prompt {text!r} needs an unconditional pass, which {self.name!r} with guidance_scale "
                f"{guidance_scale:g} has not"
            )

    def texts_encoded(self, guidance_scale: float, negative_prompt: str | None = None) -> int:
        """Texts that the encoder reads for one lane: its prompt, and with guidance what this leads away from."""
        guided = self.passes(guidance_scale) == 2
        return 2 if guided and (self.encodes_negative or negative_prompt is not None) else 1

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=2)

    # ----------------------------------------------------------------- denoiser, pictures

    @abstractmethod
    def predict(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        level: Level,
        conditioning: Conditioning,
        guidance_scale: float,
        capture: bool = True,
    ) -> Prediction:
        """Evaluate the denoiser for lanes (B, C, h, w), each at its own ``timesteps`` (B,) and ``level``.

        Without ``capture`` no attention is recorded and the maps have no tokens.
        """

    @frozen_call
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Full decode of latents (B, C, h, w) to pictures (B, 3, H, W) float32 in [0, 1].

        As many at a time as ``decode_memory`` has room for.
        """
        return in_slices(self._decode, latents, self._at_once(latents.shape[2:].numel() * self.spatial_factor**2))

    @frozen_call
    def encode_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) of pictures (B, 3, H, W) in [0, 1], by the autoencoder's mean; sliced as `decode`."""
        return in_slices(self._encode_pictures, pictures, self._at_once(pictures.shape[2:].numel()))

    def _at_once(self, pixels: int) -> int:
        """Pictures of so many ``pixels`` that the autoencoder takes in one call."""
        load_now(self.vae)
        return self.pictures_at_once(self.vae, pixels)

    def pictures_at_once(self, decoder: Any, pixels: int) -> int:
        """How many pictures of so many ``pixels`` a ``decoder`` on this device may work on: at least one."""
        ceiling = activation_ceiling(self.device, self.decode_memory)
        return int(min(max(1, ceiling // (bytes_per_pixel(decoder) * pixels)), 2**31))

    @abstractmethod
    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """`decode` in one call."""

    @abstractmethod
    def _encode_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """`encode_pictures` in one call."""

    # ----------------------------------------------------------------- cost

    def flops(self, component: str, shape: tuple[int, ...]) -> float:
        """FLOPs per lane of ``denoiser`` (one pass), ``decode`` or ``text`` (one prompt); measured once per shape."""
        key = (component, shape)
        if key not in self._flops:
            self._flops[key] = count_flops(self._one_lane(component, shape), self.device)
        return self._flops[key]

    @abstractmethod
    def _one_lane(self, component: str, shape: tuple[int, ...]) -> Callable[[], Any]:
        """A call that runs ``component`` once, for `flops`."""


# --------------------------------------------------------------------------- noise, plain denoising


@isolated()
def draw_noise(backbone: Backbone, shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Noise (B, C, h, w) of ``shape`` (C, h, w), each lane's drawn by its own generator.

    It is drawn on the CPU, as diffusers does with CPU generators, and sent to the device in one piece.
    """
    noise = [torch.randn(1, *shape, generator=generator, dtype=backbone.dtype) for generator in generators]
    return torch.cat(noise).to(backbone.device, non_blocking=True)


def initial_noise(backbone: Backbone, shape: tuple[int, ...], seeds: Sequence[int]) -> torch.Tensor:
    """Initial latents (B, C, h, w) of ``seeds``: the same for every method, whatever batch they travel in."""
    return draw_noise(backbone, shape, [torch.Generator().manual_seed(int(seed)) for seed in seeds])


@isolated()
def denoise(
    backbone: Backbone,
    schedule: Schedule,
    prompts: list[str],
    latents: torch.Tensor,
    guidance_scale: float,
    watch: Callable[[int, torch.Tensor, Prediction], None] | None = None,
    capture: Sequence[int] = (),
    negative_prompt: str | None = None,
) -> torch.Tensor:
    """The whole schedule without decisions, all lanes in step: initial to final latents (B, C, h, w).

    ``watch(index, latents, prediction)`` sees every evaluation and the latents it was made at; attention is
    captured at the steps of ``capture``. Stochastic solvers (eta > 0) are refused.

    Raises:
        ValueError: the schedule needs fresh noise.
    """
    if schedule.needs_noise:
        raise ValueError(f"denoise() runs deterministic solvers, got eta {schedule.eta}")
    conditioning = backbone.encode_prompts(prompts, negative_prompt)
    before = torch.zeros_like(latents)
    known = torch.zeros(len(latents), dtype=torch.bool, device=latents.device)
    for index in range(schedule.num_inference_steps):
        at = torch.full((len(latents),), index, device=latents.device)
        now = backbone.predict(
            latents, schedule.timesteps[at], schedule.current.at(at), conditioning, guidance_scale, index in capture
        )
        if watch is not None:
            watch(index, latents, now)
        latents = solver_step(schedule, latents, now.x0, at, before, known)
        before, known = now.x0, torch.ones_like(known)
    return latents


def to_uint8(pictures: torch.Tensor) -> np.ndarray:
    """Pictures (B, 3, H, W) in [0, 1] to uint8 (B, H, W, 3)."""
    return (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


class Decoder(Protocol):
    """What makes pictures (B, 3, H, W) of latents (B, C, h, w): a backbone, or a previewer."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """In [0, 1], float32."""


def decode_finite(decoder: Decoder, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (B, 3, H, W) of latents (B, C, h, w), grey where not finite; and which (B,) bool are finite."""
    pictures = decoder.decode(latents)
    finite = torch.isfinite(pictures).flatten(1).all(1)
    return torch.where(finite[:, None, None, None], pictures, 0.5), finite


# --------------------------------------------------------------------------- for the subclasses


def with_negative(prompt: Conditioning, negative: Conditioning) -> Conditioning:
    """``prompt`` with the embeddings of ``negative`` to lead away from; they are shared, not copied."""
    return Conditioning(prompt.embeddings, prompt.content, negative.embeddings, prompt.pooled, negative.pooled)


@contextmanager
def read_outputs(module: Any, read: Callable[[Any], torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """What ``read`` makes of each of a module's outputs, in order, for as long as the block lasts."""
    found: list[torch.Tensor] = []
    hook = module.register_forward_hook(lambda module, args, output: found.append(read(output)))
    try:
        yield found
    finally:
        hook.remove()


def compile_block(module: Any) -> None:
    """Compile a module in place, once for all batch sizes (``torch.compile``).

    PyTorch gives up on a function after eight graphs and runs it uncompiled from then on. The count is a function's,
    which a network's blocks share, and blocks of other widths are other graphs.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        module.compile(dynamic=True, recompile_limit=_RECOMPILE_LIMIT)
        return
    torch._dynamo.config.recompile_limit = max(_RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    module.compile(dynamic=True)


def scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """A scheduler's configuration as its file has it: values that its class filled in are left out.

    diffusers does the same when another scheduler class is made of it (``from_config``).
    """
    config = dict(scheduler.config)
    filled = set(config.pop("_use_default_values", [])) - {"clip_sample"}  # diffusers clips unless told not to
    kept = {name: value for name, value in config.items() if name not in filled}
    return kept | {"_class_name": type(scheduler).__name__}


def guide(output: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6) of (2B, ...), the unconditional half first."""
    unconditional, text = output.chunk(2)
    return unconditional + guidance_scale * (text - unconditional)
