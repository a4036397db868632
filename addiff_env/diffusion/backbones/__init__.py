"""Backbones: frozen text-to-image models behind one protocol, loaded once and shared."""

from __future__ import annotations

from typing import Any

from addiff_env.diffusion.backbones.base import Backbone, decode_finite, denoise, draw_noise, initial_noise, to_uint8
from addiff_env.diffusion.backbones.flux import FluxBackbone
from addiff_env.diffusion.backbones.offload import check_offload
from addiff_env.diffusion.backbones.open import open_pipeline
from addiff_env.diffusion.backbones.stable_diffusion import StableDiffusionBackbone
from addiff_env.diffusion.backbones.types import BackboneOptions, Conditioning, Prediction
from addiff_env.loading.flops import count_flops
from addiff_env.loading.weights import DTYPES, resolve_device, resolve_dtype, shared

__all__ = [
    "Backbone",
    "BackboneOptions",
    "Conditioning",
    "FluxBackbone",
    "Prediction",
    "StableDiffusionBackbone",
    "count_flops",
    "decode_finite",
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
    return _load(
        BackboneOptions(
            model, revision, device, dtype, attention_stride, channels_last, compile, decode_memory, offload
        ),
        lora,
    )


@shared
def _load(options: BackboneOptions, lora: str | None) -> Backbone:
    pipeline = open_pipeline(options.name, options.revision, DTYPES[options.dtype_name], lora)
    kind = CLASSES.get(type(pipeline).__name__)
    if kind is None:
        raise ValueError(f"{options.name!r} is a {type(pipeline).__name__}; supported: {', '.join(CLASSES)}")
    return kind(pipeline, options)
