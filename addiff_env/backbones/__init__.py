"""Backbones: frozen text-to-image models behind one protocol, loaded once and shared."""

from __future__ import annotations

from addiff_env.backbones.base import Backbone, Conditioning, draw_noise, initial_noise, to_uint8
from addiff_env.backbones.stable_diffusion import StableDiffusionBackbone
from addiff_env.loading import resolve_dtype

__all__ = [
    "Backbone",
    "Conditioning",
    "StableDiffusionBackbone",
    "draw_noise",
    "initial_noise",
    "load_backbone",
    "to_uint8",
]

_CACHE: dict[tuple[str | int | None, ...], Backbone] = {}


def load_backbone(model: str, revision: str | None, device: str, dtype: str, attention_stride: int) -> Backbone:
    """Load a model folder or Hub id; the same arguments give the same object, so weights are in memory once.

    Raises:
        FileNotFoundError, ValueError: as `StableDiffusionBackbone`.
    """
    dtype = resolve_dtype(dtype, device)
    key = (model, revision, device, dtype, attention_stride)
    if key not in _CACHE:
        _CACHE[key] = StableDiffusionBackbone(model, revision, device, dtype, attention_stride)
    return _CACHE[key]
