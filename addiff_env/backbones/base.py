"""What an environment needs of a text-to-image model, and what all of them share."""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from addiff_env.isolation import exclusive, frozen_call, isolated
from addiff_env.loading import DTYPES
from addiff_env.samplers import Level, Schedule, make_schedule, solver_step

_CACHED_PROMPTS = 4096  # encoded prompts kept; they repeat within an evaluation, not for ever


@dataclass
class Conditioning:
    """Encoded prompts of B lanes; what a model does not use is None."""

    embeddings: torch.Tensor  # (B, tokens, width) of the prompt
    content: torch.Tensor  # (B, tokens) bool: the prompt's own words, without BOS, EOS and padding
    negative: torch.Tensor | None = None  # (B, tokens, width) of the empty prompt
    pooled: torch.Tensor | None = None  # (B, width) of the prompt (SDXL, Flux)
    negative_pooled: torch.Tensor | None = None  # (B, width) of the empty prompt (SDXL)

    def __getitem__(self, lanes: torch.Tensor) -> Conditioning:
        """The conditioning of some lanes, by index."""
        values = (getattr(self, f.name) for f in fields(self))
        return Conditioning(*(None if value is None else value[lanes] for value in values))

    def put(self, lanes: torch.Tensor, other: Conditioning) -> None:
        """Overwrite some lanes."""
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                value[lanes] = getattr(other, f.name)

    @classmethod
    def stack(cls, rows: Sequence[Conditioning]) -> Conditioning:
        """One batch of single-lane encodings, each without the lane dimension."""
        columns = ([getattr(row, f.name) for row in rows] for f in fields(cls))
        return cls(*(None if column[0] is None else torch.stack(column) for column in columns))


@dataclass
class Prediction:
    """One denoiser evaluation of B lanes."""

    x0: torch.Tensor  # (B, C, h, w) clean prediction, latents' dtype
    maps: torch.Tensor  # (B, tokens, h', w') float32 cross-attention of the conditional half; no tokens if not captured
    features: torch.Tensor  # (B, channels) float32, pooled activations of the network's middle


class Backbone(ABC):
    """A frozen model; its conventions (prediction type, scaling, packing, guidance) end here.

    Environments share it, also between threads: subclasses set the attributes below and write the methods marked
    abstract, those that run a network as a `frozen_call`.
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
    encodes_negative: bool = False  # whether guidance encodes the empty prompt too

    def __init__(self, name: str, revision: str | None, device: str, dtype_name: str) -> None:
        self.name, self.revision = name, revision
        self.device, self.dtype, self.dtype_name = torch.device(device), DTYPES[dtype_name], dtype_name
        self._prompts: dict[str, Conditioning] = {}
        self._warned: set[str] = set()
        self._flops: dict[tuple[Any, ...], float] = {}

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
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Encode texts as the model's pipeline does; what is too long is truncated, with one warning."""
        rows = []
        for prompt in prompts:
            if prompt not in self._prompts:
                if len(self._prompts) >= _CACHED_PROMPTS:
                    self._prompts.clear()
                self._prompts[prompt] = self._encode(prompt)
            rows.append(self._prompts[prompt])
        return Conditioning.stack(rows)

    @abstractmethod
    def _encode(self, prompt: str) -> Conditioning:
        """One prompt, without the lane dimension."""

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

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Full decode to pictures (B, 3, H, W) float32 in [0, 1]."""

    @abstractmethod
    def encode_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) of pictures (B, 3, H, W) in [0, 1], by the autoencoder's mean."""

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
) -> torch.Tensor:
    """The whole schedule without decisions, all lanes in step: initial to final latents (B, C, h, w).

    ``watch(index, latents, prediction)`` sees every evaluation and the latents it was made at; attention is
    captured at the steps of ``capture``. Stochastic solvers (eta > 0) are refused.

    Raises:
        ValueError: the schedule needs fresh noise.
    """
    if schedule.needs_noise:
        raise ValueError(f"denoise() runs deterministic solvers, got eta {schedule.eta}")
    conditioning = backbone.encode_prompts(prompts)
    before = torch.zeros_like(latents)
    known = torch.zeros(len(latents), dtype=torch.bool, device=latents.device)
    for index in range(schedule.num_inference_steps):
        at = torch.full((len(latents),), index, device=latents.device)
        now = backbone.predict(
            latents, schedule.timesteps[at], schedule.here.at(at), conditioning, guidance_scale, index in capture
        )
        if watch is not None:
            watch(index, latents, now)
        latents = solver_step(schedule, latents, now.x0, at, before, known)
        before, known = now.x0, torch.ones_like(known)
    return latents


def to_uint8(pictures: torch.Tensor) -> np.ndarray:
    """Pictures (B, 3, H, W) in [0, 1] to uint8 (B, H, W, 3)."""
    return (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


# --------------------------------------------------------------------------- for the subclasses


def count_flops(call: Callable[[], Any], device: torch.device | str) -> float:
    """FLOPs of one call on ``device``, by `torch.utils.flop_counter` (matrix products, convolutions, attention)."""
    # The counter knows CUDA's fused attention, but not the CPU's: there attention is written out while it counts.
    written_out = sdpa_kernel(SDPBackend.MATH) if torch.device(device).type == "cpu" else nullcontext()
    # Which kernels attention uses is a setting of the process, and the counter watches all of its modules.
    with exclusive(), _plain_multihead_attention(), written_out, FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


@contextmanager
def _plain_multihead_attention() -> Iterator[None]:
    """Keep `nn.MultiheadAttention` (open_clip's towers) from its fused inference path, which counts as no FLOPs."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """A scheduler's configuration as its file has it: values that its class filled in are left out.

    diffusers does the same when another scheduler class is made of it (``from_config``).
    """
    config = dict(scheduler.config)
    filled = set(config.pop("_use_default_values", [])) - {"clip_sample"}  # diffusers clips unless told not to
    kept = {name: value for name, value in config.items() if name not in filled}
    return kept | {"_class_name": type(scheduler).__name__}


def content_tokens(tokenizer: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Which ``tokens`` (L,) are the prompt's own, (L,) bool; an empty prompt keeps one, so that maps exist."""
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    special |= {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    content = torch.tensor([int(token) not in special for token in tokens])
    if not content.any():
        content[min(1, len(content) - 1)] = True
    return content


def truncated_words(tokenizer: Any, prompt: str, limit: int) -> str:
    """The end of ``prompt`` that does not fit into ``limit`` tokens, special ones included; "" if it fits."""
    special = tokenizer.num_special_tokens_to_add()
    pieces = tokenizer.tokenize(prompt)
    if len(pieces) <= limit - special:
        return ""
    return tokenizer.convert_tokens_to_string(pieces[limit - special :]).replace("</w>", " ").strip()


def spelled_out_words(tokenizer: Any, prompt: str) -> list[str]:
    """Words of ``prompt`` that the tokenizer does not know: at least half of their pieces are single letters."""
    words = re.findall(r"[^\W\d_]{2,}", prompt)
    return [word for word in words if _is_spelled_out(tokenizer.tokenize(word))]


def _is_spelled_out(pieces: list[str]) -> bool:
    return 2 * sum(len(piece.removesuffix("</w>")) == 1 for piece in pieces) >= len(pieces)


def guide(output: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6) of (2B, ...), the unconditional half first."""
    unconditional, text = output.chunk(2)
    return unconditional + guidance_scale * (text - unconditional)
