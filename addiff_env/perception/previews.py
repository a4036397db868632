"""Preview decoders: what a clean prediction looks like, at a fraction of a full decode's cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from addiff_env.loading.damage import wrong_at
from addiff_env.loading.flops import count_flops
from addiff_env.loading.isolation import frozen, isolated
from addiff_env.loading.memory import in_slices
from addiff_env.loading.paths import looked_at, resolve_model
from addiff_env.loading.weights import DTYPES, gated_advice, load_network, quiet_loading, shared

PREVIEWS = ("vae", "taesd", "latent_rgb")
FIT_PICTURES, FIT_CELLS = 16, 16  # pictures that `fit_latent_rgb` looks at, and their side in latent cells


class Model(Protocol):
    """What previews need of a text-to-image model, as `addiff_env.diffusion.backbones.Backbone` has it."""

    name: str
    device: torch.device
    dtype_name: str
    latent_channels: int
    spatial_factor: int
    size_multiple: int

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) to pictures (B, 3, H, W) float32 in [0, 1]."""

    def encode_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """The other way round."""

    def flops(self, component: str, shape: tuple[int, ...]) -> float:
        """FLOPs of a ``decode`` of latents ``shape``."""

    def pictures_at_once(self, decoder: Any, pixels: int) -> int:
        """How many pictures of so many pixels ``decoder`` may decode together."""


class Previewer(Protocol):
    """Decodes clean predictions for looking at."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) to pictures (B, 3, H, W) float32 in [0, 1]."""

    def flops(self, shape: tuple[int, ...]) -> float:
        """FLOPs of one decode of latents ``shape`` (C, h, w)."""


class FullDecoder:
    """The model's own decoder."""

    def __init__(self, backbone: Model) -> None:
        self.backbone = backbone

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """As `Backbone.decode`."""
        return self.backbone.decode(latents)

    def flops(self, shape: tuple[int, ...]) -> float:
        """FLOPs of a full decode."""
        return self.backbone.flops("decode", shape)


class TinyDecoder:
    """A distilled decoder in `AutoencoderTiny`'s layout (TAESD, Bohan 2023).

    Raises:
        FileNotFoundError: no such model; ValueError: its files are damaged, or it is for other latents.
    """

    def __init__(self, backbone: Model, model: str) -> None:
        self.vae = load_tiny_decoder(resolve_model(model), str(backbone.device), backbone.dtype_name)
        channels = self.vae.config.latent_channels
        if channels != backbone.latent_channels:
            raise ValueError(
                f"preview_model {model!r} decodes latents of {channels} channels, {backbone.name!r} has "
                f"{backbone.latent_channels}"
            )
        self.backbone = backbone
        self._flops: dict[tuple[int, ...], float] = {}

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) to pictures (B, 3, H, W) float32 in [0, 1], sliced as `Backbone.decode`."""
        pixels = latents.shape[2:].numel() * self.backbone.spatial_factor**2
        with frozen(self.vae):
            return in_slices(self._decode, latents, self.backbone.pictures_at_once(self.vae, pixels))

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        scaled = (latents / self.vae.config.scaling_factor).contiguous(memory_format=torch.channels_last)
        return (self.vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def flops(self, shape: tuple[int, ...]) -> float:
        """FLOPs of one decode, measured once per shape."""
        if shape not in self._flops:
            parameter = next(self.vae.parameters())
            latents = torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype)
            self._flops[shape] = count_flops(lambda: self.decode(latents), parameter.device)
        return self._flops[shape]


@shared
def load_tiny_decoder(model: str, device: str, dtype: str) -> Any:
    """An `AutoencoderTiny`, frozen; FileNotFoundError or ValueError as `TinyDecoder`."""
    try:
        with quiet_loading():
            vae = load_network(AutoencoderTiny, model, dtype=DTYPES[dtype], use_safetensors=True)
    except Exception as error:
        kind = ValueError if Path(model).exists() else FileNotFoundError
        said = f"{error}{wrong_at(model)}; download it or pass a folder{gated_advice(error)}"
        raise kind(f"cannot load a preview decoder from {looked_at(model)}: {said}") from error
    return vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


class LinearDecoder:
    """Each latent cell's colour as a linear map of its channels, fitted to the model's own autoencoder."""

    def __init__(self, backbone: Model) -> None:
        self.scale = backbone.spatial_factor
        self.weight, self.bias = fit_latent_rgb(backbone)  # (3, C), (3,)

    @isolated()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) to pictures (B, 3, H, W) float32 in [0, 1], bilinearly enlarged."""
        small = torch.einsum("rc,bchw->brhw", self.weight, latents.float()) + self.bias[:, None, None]
        return F.interpolate(small, scale_factor=self.scale, mode="bilinear", align_corners=False).clamp(0, 1)

    def flops(self, shape: tuple[int, ...]) -> float:
        """A multiplication and an addition per channel, colour and cell."""
        return 2.0 * 3 * shape[0] * shape[1] * shape[2]


@isolated()
def fit_latent_rgb(backbone: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares map from latent channels to mean colour: weight (3, C), bias (3,), float32 on the device.

    The pictures it is fitted to are smooth random fields, encoded by the model's autoencoder: no weights, prompts or
    denoising are needed, and the same model always gives the same map.
    """
    side = max(FIT_CELLS * backbone.spatial_factor, backbone.size_multiple)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(FIT_PICTURES, 3, 5, 5, generator=generator)
    pictures = F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    latents = backbone.encode_pictures(pictures.to(backbone.device)).double().cpu()
    colours = F.interpolate(pictures.double(), latents.shape[2:], mode="area")
    inputs = latents.movedim(1, -1).reshape(-1, latents.shape[1])
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(inputs, colours.movedim(1, -1).reshape(-1, 3)).solution.float().to(backbone.device)
    return solution[:-1].T.contiguous(), solution[-1]


def make_previewer(kind: str, backbone: Model, model: str | None = None) -> Previewer:
    """The decoder of a ``preview`` setting; ``model`` is the TAESD to use.

    Raises:
        ValueError: unknown kind, or as `TinyDecoder`; FileNotFoundError: the model is not there.
    """
    if kind == "vae":
        return FullDecoder(backbone)
    if kind == "latent_rgb":
        return LinearDecoder(backbone)
    if kind == "taesd" and model:
        return TinyDecoder(backbone, model)
    raise ValueError(f"unknown preview {kind!r} (model {model!r}); known: {', '.join(PREVIEWS)}")
