"""Memory that a model of the Hub needs, by accounting: its published layout is run without weights and without numbers.

``addiff profile --memory`` prints the table. What a convolution's algorithm or an allocator takes besides
is not in it: leave a fifth free.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FluxTransformer2DModel, UNet2DConditionModel
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    T5Config,
    T5EncoderModel,
)

import addiff_env
from addiff_env.loading.isolation import exclusive
from addiff_env.loading.memory import GIB, bytes_per_pixel
from addiff_env.loading.weights import DTYPES
from addiff_env.perception.scorers.image_reward import ImageReward

_TEXT_TOKENS = {"AdDiffusion-FluxSchnell-v0": 256}  # CLIP's 77 elsewhere


# --------------------------------------------------------------------------- counting


class _Allocations(TorchDispatchMode):
    """While it lasts, bytes of all tensors that are alive and were made since it began."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {storage._cdata for storage in _storages((args, kwargs))}  # weights, of which views are made
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in before and storage._cdata not in self._known:
                self._note(storage)
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storages(tree: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@torch.no_grad()
def peak_allocation(call: Callable[[], Any]) -> int:
    """The most bytes that tensors made by ``call`` take at once, its results included."""
    with _Allocations() as allocations:
        call()
    return allocations.peak


@contextmanager
def made_in(dtype: torch.dtype) -> Iterator[None]:
    """While the context lasts, new weights are of ``dtype``, in the whole process: no other thread computes then."""
    with exclusive():
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def parameter_bytes(build: Callable[[], Any], dtype: torch.dtype) -> int:
    """Bytes of a network's weights and buffers."""
    with made_in(dtype), torch.device("meta"):
        network = build()
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


# --------------------------------------------------------------------------- published layouts


def _autoencoder(latent_channels: int = 4, **more: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=latent_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **more,
    )


def _clip_text(width: int = 768, layers: int = 12, heads: int = 12, projected: bool = False) -> Any:
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        cross_attention_dim=2048,
    )


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )


def _openai_clip() -> Any:
    import open_clip

    return open_clip.CLIP(**open_clip.get_model_config("ViT-L-14"))


@dataclass(frozen=True)
class Layout:
    """What an id loads, without its weights."""

    denoiser: Callable[[], Any]
    texts: tuple[Callable[[], Any], ...]
    vae: Callable[[], Any]
    passes: int  # of one evaluation
    upcast: bool = False  # whether float16 decodes in float32
    published: str = "float32"  # dtype of the published weights


ROOM = 1.25  # times the accounted memory is asked for: a fifth is left free for what is not accounted
LAYOUTS = {
    "AdDiffusion-SD15-v0": Layout(
        lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768), (_clip_text,), _autoencoder, passes=2
    ),
    "AdDiffusion-SDXL-v0": Layout(
        _sdxl_unet, (_clip_text, lambda: _clip_text(1280, 32, 20, True)), _autoencoder, passes=2, upcast=True
    ),
    "AdDiffusion-FluxSchnell-v0": Layout(
        FluxTransformer2DModel,
        (_clip_text, _t5),
        lambda: _autoencoder(16, use_quant_conv=False, use_post_quant_conv=False),
        passes=1,
        published="bfloat16",
    ),
}
# Of every id: CLIP, DINOv2 and ImageReward, in float32.
_LOOKERS: tuple[Callable[[], Any], ...] = (
    _openai_clip,
    lambda: Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)),
    lambda: ImageReward(None),
)


def _call(env_id: str, network: Any, rows: int, dtype: torch.dtype, size: tuple[int, int]) -> dict[str, Any]:
    """Inputs of a denoiser's call on ``rows`` rows, for pictures of ``size`` (height, width)."""
    height, width = (pixels // 8 for pixels in size)
    tokens = _TEXT_TOKENS.get(env_id, 77)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    if isinstance(network, FluxTransformer2DModel):
        patches = height * width // 4
        return {
            "hidden_states": zeros(rows, patches, 64),
            "timestep": zeros(rows),
            "pooled_projections": zeros(rows, 768),
            "encoder_hidden_states": zeros(rows, tokens, 4096),
            "txt_ids": zeros(tokens, 3),
            "img_ids": zeros(patches, 3),
        }
    context: dict[str, Any] = {"encoder_hidden_states": zeros(rows, tokens, network.config.cross_attention_dim)}
    if network.config.addition_embed_type == "text_time":
        context["added_cond_kwargs"] = {"text_embeds": zeros(rows, 1280), "time_ids": zeros(rows, 6)}
    return {"sample": zeros(rows, 4, height, width), "timestep": torch.zeros(rows), **context}


@cache
def _denoiser_bytes(env_id: str, dtype: torch.dtype, size: tuple[int, int]) -> tuple[float, float]:
    """Activations of a denoiser call: what it takes anyway, and per row."""
    with made_in(dtype), FakeTensorMode():
        network = LAYOUTS[env_id].denoiser().eval()
        one, two = (
            peak_allocation(lambda rows=rows: network(**_call(env_id, network, rows, dtype, size))) for rows in (2, 4)
        )
    return 2 * one - two, (two - one) / 2


# --------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Footprint:
    """Memory of one id in one dtype, bytes."""

    env_id: str
    dtype: str
    lanes: int  # of one denoiser call
    networks: int  # weights of denoiser, text encoders and autoencoder
    lookers: int  # weights of CLIP, DINOv2, ImageReward and the preview decoder
    denoiser: float  # activations of a call for ``lanes``
    decode: int  # activations per picture decoded at a time
    largest: int  # weights of the largest network

    @property
    def peak(self) -> float:
        """Expected peak with one picture decoded at a time, or as many as fit beside what the denoiser takes."""
        return self.peak_with("none")

    def peak_with(self, offload: str) -> float:
        """The same where networks wait on the host: all but the one at work, or all but its layer at work."""
        weights = {"none": self.networks, "model": self.largest, "sequential": 0}[offload]
        return weights + self.lookers + max(self.denoiser, self.decode)


def footprint(env_id: str, dtype: str, lanes: int, size: tuple[int, int] | None = None) -> Footprint:
    """The accounting of one id; ``size`` (height, width) is the id's own unless it is given.

    Raises:
        ValueError: another id than those of `LAYOUTS`, an unknown dtype, or no lane.
    """
    if env_id not in LAYOUTS or dtype not in DTYPES or lanes < 1:
        known = f"{', '.join(LAYOUTS)}; {', '.join(DTYPES)}; at least 1 lane"
        raise ValueError(f"no accounting of {env_id!r} in {dtype!r} with {lanes} lanes; known: {known}")
    layout, kind, preset = LAYOUTS[env_id], DTYPES[dtype], addiff_env.PRESETS[env_id]
    height, width = size or (preset["height"], preset["width"])
    decoder_kind = torch.float32 if layout.upcast and kind == torch.float16 else kind
    networks = [parameter_bytes(build, kind) for build in (layout.denoiser, *layout.texts)]
    networks.append(parameter_bytes(layout.vae, decoder_kind))
    lookers = sum(parameter_bytes(build, torch.float32) for build in _LOOKERS) + parameter_bytes(AutoencoderTiny, kind)
    with made_in(decoder_kind), torch.device("meta"):
        decode = bytes_per_pixel(layout.vae()) * height * width
    fixed, per_row = _denoiser_bytes(env_id, kind, (height, width))
    denoiser = fixed + per_row * layout.passes * lanes
    return Footprint(env_id, dtype, lanes, sum(networks), lookers, denoiser, decode, max(networks))


def download_bytes(env_id: str) -> dict[str, int]:
    """About how large the published weights are that an id's settings name, bytes, by the setting."""
    layout = LAYOUTS[env_id]
    parts = (layout.denoiser, *layout.texts, layout.vae)
    sizes = {"model": sum(parameter_bytes(build, DTYPES[layout.published]) for build in parts)}
    lookers = zip(("clip", "dino", "scorer", "preview_model"), (*_LOOKERS, AutoencoderTiny), strict=True)
    return sizes | {setting: parameter_bytes(build, torch.float32) for setting, build in lookers}


def memory_table(
    lanes: Sequence[int] = (1, 4, 16, 32), dtypes: Sequence[str] = ("float16", "bfloat16", "float32")
) -> str:
    """Expected memory of every id, number of lanes in a call and dtype, in GiB."""
    head = ("id", "dtype", "lanes a call", "networks", "lookers", "denoiser call", "decode, a picture", "peak")
    lines = [head, tuple("---" for _ in head)]
    for env_id in LAYOUTS:
        for dtype in dtypes:
            for number in lanes:
                found = footprint(env_id, dtype, number)
                sizes = (found.networks, found.lookers, found.denoiser, found.decode, found.peak)
                lines.append((env_id, dtype, str(number), *(f"{size / GIB:.1f}" for size in sizes)))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
