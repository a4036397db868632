"""What an environment needs of a text-to-image model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch


@dataclass
class Conditioning:
    """Encoded prompts of B lanes."""

    embeddings: torch.Tensor  # (B, tokens, width) of the prompt
    negative: torch.Tensor  # (B, tokens, width) of the empty prompt
    content: torch.Tensor  # (B, tokens) bool: the prompt's own words, without BOS, EOS and padding

    def __getitem__(self, lanes: torch.Tensor) -> Conditioning:
        """The conditioning of some lanes, by index."""
        return Conditioning(*(getattr(self, f.name)[lanes] for f in fields(self)))

    def put(self, lanes: torch.Tensor, other: Conditioning) -> None:
        """Overwrite some lanes."""
        for f in fields(self):
            getattr(self, f.name)[lanes] = getattr(other, f.name)


@dataclass
class Prediction:
    """One denoiser evaluation of B lanes."""

    x0: torch.Tensor  # (B, C, h, w) clean prediction, latents' dtype
    maps: torch.Tensor  # (B, tokens, h', w') float32 cross-attention of the conditional half
    features: torch.Tensor  # (B, channels) float32, pooled mid-block activations


class Backbone(Protocol):
    """A frozen model; its conventions (prediction type, scaling, guidance) end here."""

    name: str
    device: torch.device
    dtype: torch.dtype
    scheduler_config: dict[str, Any]
    latent_channels: int
    spatial_factor: int  # picture pixels per latent cell
    feature_width: int  # channels of the U-Net's middle

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Encode texts; a text that is too long is truncated as the tokenizer does, with one warning."""

    def predict(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        alphas_cumprod: torch.Tensor,
        conditioning: Conditioning,
        guidance_scale: float,
        capture: bool = True,
    ) -> Prediction:
        """Evaluate the denoiser at (``latents``, ``timesteps``), each lane at its own level.

        Without ``capture`` no attention is recorded and the maps are empty.
        """

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Full decode to pictures (B, 3, H, W) float32 in [0, 1]."""

    def flops(self, component: str, latents_shape: tuple[int, ...]) -> float:
        """Floating-point operations of ``denoiser`` (one pass), ``decode`` or ``text``, per lane."""


def draw_noise(backbone: Backbone, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Noise of one lane, ``shape`` (C, h, w), drawn on the CPU as diffusers does with CPU generators."""
    noise = torch.randn(1, *shape, generator=generator, dtype=backbone.dtype)
    return noise[0].to(backbone.device)


def initial_noise(backbone: Backbone, shape: tuple[int, ...], seeds: Sequence[int]) -> torch.Tensor:
    """Initial latents (B, C, h, w) of ``seeds``: the same for every method, whatever batch they travel in."""
    return torch.stack([draw_noise(backbone, shape, torch.Generator().manual_seed(seed)) for seed in seeds])


def to_uint8(pictures: torch.Tensor) -> np.ndarray:
    """Pictures (B, 3, H, W) in [0, 1] to uint8 (B, H, W, 3)."""
    return (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
