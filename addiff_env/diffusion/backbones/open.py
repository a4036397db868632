"""Opening a diffusers pipeline, from the Hub or a local folder, with errors that say what to do."""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from addiff_env.loading.damage import wrong_at
from addiff_env.loading.paths import PACKAGE_PREFIX, looked_at, resolve_model
from addiff_env.loading.weights import (
    check_finite,
    check_tokenizer,
    gated_advice,
    load_network,
    quiet_loading,
    some,
)

PIPELINE_OPTIONS: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False, "use_safetensors": True}
_MATRICES = (("lora_A.", "lora_B."), ("lora.down.", "lora.up."))  # of a layer's LoRA


def open_pipeline(model: str, revision: str | None, dtype: torch.dtype, lora: str | None = None) -> Any:
    """Load a pipeline without its safety checker; a LoRA is fused into the weights.

    The safety checker replaces pictures by black ones, which an agent must not be rewarded or blamed for: whoever
    shows pictures to others runs one on what comes out. Only safetensors are read, so nothing is unpickled.

    Raises:
        FileNotFoundError: the model or the LoRA is not there; the message says how to get it.
        ValueError: a file of it is damaged, lacks weights or holds others. ImportError: a LoRA needs peft.
    """
    folder = resolve_model(model)
    try:
        with quiet_loading():
            pipeline = _load_pipeline(folder, revision, dtype)
    except Exception as error:
        there = Path(folder).exists()
        where = f"folder {folder}" if there else f"model {looked_at(model)}, neither a local folder nor loadable"
        packaged = model.startswith(PACKAGE_PREFIX)
        hint = "retrain it with: addiff world train" if packaged else "download it, or pass model=<pipeline folder>"
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) or not there else ValueError
        advice = "" if there else gated_advice(error, model)
        said = f"{error}{wrong_at(folder)}; {hint}{advice}"
        raise kind(f"cannot load a diffusers pipeline from {where}: {said}") from error
    if lora is not None:
        _fuse_lora(pipeline, lora)
    return pipeline


def _load_pipeline(model: str, revision: str | None, dtype: torch.dtype) -> Any:
    """A pipeline all of whose networks' weights are the files'; diffusers itself would only warn."""
    folder = model if Path(model).is_dir() else DiffusionPipeline.download(model, revision=revision, **PIPELINE_OPTIONS)
    networks = {
        name: load_network(kind, part, dtype=dtype, use_safetensors=True) for name, kind, part in _parts(folder)
    }
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **networks, **PIPELINE_OPTIONS)
    for name, part in pipeline.components.items():
        if isinstance(part, PreTrainedTokenizerBase):
            _check_tokenizer(part, Path(folder, name))
    return pipeline


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    check_tokenizer(tokenizer, place)
    if tokenizer.model_max_length >= VERY_LARGE_INTEGER:
        raise ValueError(f"{str(place)!r} does not say how long a text may be: model_max_length of its configuration")


def _parts(folder: str) -> Iterator[tuple[str, Any, Path]]:
    """Name, class and folder of a pipeline's networks, as its index lists them; the safety checker is left out."""
    for name, entry in DiffusionPipeline.load_config(folder).items():
        part = Path(folder, name)
        if not isinstance(entry, (list, tuple)) or entry[0] not in ("diffusers", "transformers") or not part.is_dir():
            continue
        kind = getattr(importlib.import_module(entry[0]), entry[1], None)
        if name not in PIPELINE_OPTIONS and isinstance(kind, type) and issubclass(kind, torch.nn.Module):
            yield name, kind, part


def _fuse_lora(pipeline: Any, lora: str) -> None:
    """Add a LoRA to the weights for good (Hu et al. 2022), if all of it applies."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(f"lora={lora!r} needs peft: pip install 'addiff-env[lora]'") from error
    place = resolve_model(lora)
    try:
        with quiet_loading():
            state = _lora_state(pipeline, place)
            check_finite(state, place)
            _check_names(state)
            _check_effect(state)
            try:
                pipeline.load_lora_weights(place, use_safetensors=True)
            except (IndexError, KeyError, TypeError) as error:  # how diffusers fails where it finds no layer
                homeless = _without_layer(pipeline, state)
                raise ValueError(f"tensors of it fit nowhere in this model: {some(homeless or list(state))}") from error
            _check_lora(pipeline, state)
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
    except Exception as error:
        kind = ValueError if Path(place).exists() else FileNotFoundError
        advice = gated_advice(error, "" if Path(place).exists() else lora)
        hint = f"pass a Hub id or a .safetensors file{advice}"
        raise kind(f"cannot load the LoRA {looked_at(lora)}: {error}; {hint}") from error


def _lora_state(pipeline: Any, lora: str) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA, in diffusers' names."""
    blocks = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "unet") else {}
    loaded = pipeline.lora_state_dict(lora, use_safetensors=True, **blocks)
    state = loaded[0] if isinstance(loaded, tuple) else loaded
    return {name: value for name, value in state.items() if not name.endswith("alpha")}


def _check_names(state: dict[str, torch.Tensor]) -> None:
    """Refuse what no model could apply: no tensors, tensors that are no LoRA's, one of a layer's two matrices.

    Raises:
        ValueError: the message names the tensors.
    """
    if not state:
        raise ValueError("it holds no tensors of a LoRA: nothing of it would apply")
    if others := [name for name in state if not re.search("lora|dora", name.lower())]:
        raise ValueError(f"{len(others)} of its {len(state)} tensors are no LoRA's: {some(others)}")
    lacking = [
        name.replace(one, other)
        for pair in _MATRICES
        for one, other in (pair, pair[::-1])
        for name in state
        if one in name and name.replace(one, other) not in state
    ]
    if lacking:
        raise ValueError(f"it lacks {len(lacking)} tensors of the layers that it changes: {some(lacking)}")


def _check_effect(state: dict[str, torch.Tensor]) -> None:
    """Refuse a LoRA that changes nothing: training begins with B = 0, and what is saved then is the model alone.

    Raises:
        ValueError: in every layer one of the two matrices is zero.
    """
    layers = [(name, name.replace(a, b)) for a, b in _MATRICES for name in state if a in name]
    others = [name for name in state if not any(name in pair for pair in layers)]  # DoRA's magnitudes, LoHa's, ...
    if layers and not others and not any(state[a].any() and state[b].any() for a, b in layers):
        raise ValueError(f"it changes nothing: one of the two matrices of each of its {len(layers)} layers is zero")


def _without_layer(pipeline: Any, state: dict[str, torch.Tensor]) -> list[str]:
    """The names of a LoRA's tensors whose layer none of the pipeline's networks has."""
    networks = {part: network for part, network in pipeline.components.items() if isinstance(network, torch.nn.Module)}
    layers = {f"{part}.{layer}" for part, network in networks.items() for layer, _ in network.named_modules()}
    return [name for name in state if re.split(r"[._]lora", name)[0] not in layers]


def _check_lora(pipeline: Any, state: dict[str, torch.Tensor]) -> None:
    """Compare what the adapters hold with what was read: both libraries leave out what fits nowhere, with a warning.

    Values are compared, not names: files have half a dozen ways to name them.

    Raises:
        ValueError: tensors that went nowhere, or layers that got only a part of theirs; the message names them.
    """
    adapters = dict(_adapters(pipeline))
    dtypes = {value.dtype for value in adapters.values()}
    read = {_content(value.to(dtype)) for value in state.values() for dtype in dtypes}
    held = {_content(value) for value in adapters.values() if not value.is_meta}
    unused = [name for name, value in state.items() if not any(_content(value.to(d)) in held for d in dtypes)]
    drawn = [name for name, value in adapters.items() if value.is_meta or _content(value) not in read]
    if unused:
        raise ValueError(f"{len(unused)} of its {len(state)} tensors fit nowhere in this model: {some(unused)}")
    if drawn:
        raise ValueError(f"it lacks {len(drawn)} tensors of the layers that it changes: {some(drawn)}")


def _adapters(pipeline: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every tensor that a LoRA added to a pipeline's networks."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for part, network in pipeline.components.items():
        if not isinstance(network, torch.nn.Module):
            continue
        for name, module in network.named_modules():
            for kind in module.adapter_layer_names if isinstance(module, BaseTunerLayer) else ():
                for leaf, value in getattr(module, kind).named_parameters():
                    yield f"{part}.{name}.{kind}.{leaf}", value.detach()


def _content(value: torch.Tensor) -> tuple[torch.Size, bytes]:
    """Shape and digest of a tensor's values."""
    data = value.cpu().contiguous().view(torch.uint8).numpy()
    return value.shape, hashlib.sha256(data).digest()
