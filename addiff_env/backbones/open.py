"""Opening a diffusers pipeline, from the Hub or a local folder, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from addiff_env.loading import gated_advice, looked_at, quiet_loading, resolve_model


def open_pipeline(model: str, revision: str | None, dtype: torch.dtype, lora: str | None = None) -> Any:
    """Load a pipeline without its safety checker; a LoRA is fused into the weights.

    The safety checker replaces pictures by black ones, which an agent must not be rewarded or blamed for: whoever
    shows pictures to others runs one on what comes out. Only safetensors are read, so nothing is unpickled.

    Raises:
        FileNotFoundError: the model or the LoRA is not there; the message says how to get it.
        ValueError: a file of it is damaged. ImportError: a LoRA needs peft.
    """
    folder = resolve_model(model)
    options = {"safety_checker": None, "requires_safety_checker": False, "use_safetensors": True}
    try:
        with quiet_loading():
            pipeline = DiffusionPipeline.from_pretrained(folder, revision=revision, dtype=dtype, **options)
    except Exception as error:
        there = Path(folder).exists()
        where = f"folder {folder}" if there else f"model {looked_at(model)}, neither a local folder nor loadable"
        hint = "retrain it with: make tiny" if folder != model else "download it, or pass model=<pipeline folder>"
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) or not there else ValueError
        advice = "" if there else gated_advice(error, model)
        raise kind(f"cannot load a diffusers pipeline from {where}: {error}; {hint}{advice}") from error
    if lora is not None:
        _fuse_lora(pipeline, lora)
    return pipeline


def _fuse_lora(pipeline: Any, lora: str) -> None:
    """Add a LoRA to the weights for good (Hu et al. 2022)."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(f"lora={lora!r} needs peft: pip install 'addiff-env[lora]'") from error
    place = resolve_model(lora)
    try:
        with quiet_loading():
            pipeline.load_lora_weights(place, use_safetensors=True)
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
    except Exception as error:
        kind = ValueError if Path(place).exists() else FileNotFoundError
        advice = gated_advice(error, "" if Path(lora).exists() else lora)
        hint = f"pass a Hub id or a .safetensors file{advice}"
        raise kind(f"cannot load the LoRA {looked_at(lora)}: {error}; {hint}") from error
