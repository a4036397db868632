"""The embedded world's models: where they are shipped, and its denoiser."""

from __future__ import annotations

from pathlib import Path

import addiff_env
from addiff_env.diffusion.backbones import Backbone, load_backbone

WEIGHTS = Path(__file__).resolve().parent / "weights"


def load_world(weights: Path, device: str, dtype: str) -> Backbone:
    """The denoiser in the folder ``weights``, with the attention maps that the embedded world's masks read."""
    stride = addiff_env.TINY["attention_stride"]
    return load_backbone(str(weights / "pipeline"), device=device, dtype=dtype, attention_stride=stride)


def latent_shape(backbone: Backbone) -> tuple[int, int, int]:
    """(C, h, w) of the embedded world's latents."""
    return backbone.latent_shape(addiff_env.TINY["height"], addiff_env.TINY["width"])
