"""Backbones: frozen text-to-image models behind one protocol, loaded once and shared."""

from __future__ import annotations

from typing import Any

from addiff_env.diffusion.backbones.base import (
    Backbone,
    Conditioning,
    Prediction,
    denoise,
    draw_noise,
    initial_noise,
    to_uint8,
)
from addiff_env.diffusion.backbones.flux import FluxBackbone
from addiff_env.diffusion.backbones.offload import check_offload
from addiff_env.diffusion.backbones.open import open_pipeline
from addiff_env.diffusion.backbones.stable_diffusion import StableDiffusionBackbone
from addiff_env.diffusion.flops import count_flops
from addiff_env.loading.weights import DTYPES, resolve_device, resolve_dtype, shared

__all__ = [
    "Backbone",
    "Conditioning",
    "FluxBackbone",
    "Prediction",
    "StableDiffusionBackbone",
    "count_flops",
    "denoise",
    "draw_noise",
    "initial_noise",
    "load_backbone",
    "to_uint8",
]

CLASSES: dict[str, Any] = {
    "StableDiffusionPipeline": StableDiffusionBackbone,
    "StableDiffusionXLPipeline": StableDiffusionBackbone,
    "FluxPipeline": FluxBackbone,
}


def load_backbone(
    model: str,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    attention_stride: int = 4,
    lora: str | None = None,
    compile: bool = False,
    channels_last: bool = True,
    decode_memory: float | None = None,
    offload: str = "none",
) -> Backbone:
    """Load a model folder or Hub id; while anyone holds the result, the same arguments give the same object.

    Raises:
        FileNotFoundError: the model is not there, ValueError: it is damaged, of a kind that is not supported, or an
            argument does not fit it; the message shows the value.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)  # "auto" and what it stands for are the same model
    check_offload(offload, device, compile)
    return _load(model, revision, device, dtype, attention_stride, lora, compile, channels_last, decode_memory, offload)


@shared
def _load(
    model: str,
    revision: str | None,
    device: str,
    dtype: str,
    attention_stride: int,
    lora: str | None,
    compile: bool,
    channels_last: bool,
    decode_memory: float | None,
    offload: str,
) -> Backbone:
    pipeline = open_pipeline(model, revision, DTYPES[dtype], lora)
    kind = CLASSES.get(type(pipeline).__name__)
    if kind is None:
        raise ValueError(f"{model!r} is a {type(pipeline).__name__}; supported: {', '.join(CLASSES)}")
    return kind(
        pipeline, model, revision, device, dtype, attention_stride, channels_last, compile, decode_memory, offload
    )
