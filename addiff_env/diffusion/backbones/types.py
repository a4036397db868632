"""What a backbone is made with, is given and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass
class Conditioning:
    """Encoded prompts of B lanes; what a model does not use is None."""

    embeddings: torch.Tensor  # (B, tokens, width) of the prompt
    content: torch.Tensor  # (B, tokens) bool: the prompt's own words, without BOS, EOS and padding
    negative: torch.Tensor | None = None  # (B, tokens, width) of the negative prompt
    pooled: torch.Tensor | None = None  # (B, width) of the prompt (SDXL, Flux)
    negative_pooled: torch.Tensor | None = None  # (B, width) of the negative prompt (SDXL)

    def __getitem__(self, lanes: torch.Tensor) -> Conditioning:
        """The conditioning of some lanes, by index."""
        return Conditioning(*(None if value is None else value[lanes] for value in vars(self).values()))

    def put(self, lanes: torch.Tensor, other: Conditioning) -> None:
        """Overwrite some lanes."""
        for name, value in vars(self).items():
            if value is not None:
                value[lanes] = getattr(other, name)

    @classmethod
    def stack(cls, rows: Sequence[Conditioning]) -> Conditioning:
        """One batch of single-lane encodings, each without the lane dimension."""
        columns = zip(*(vars(row).values() for row in rows), strict=True)
        return cls(*(None if column[0] is None else torch.stack(column) for column in columns))

    def to(self, device: torch.device) -> Conditioning:
        """The same on ``device``."""
        return Conditioning(*(None if value is None else value.to(device) for value in vars(self).values()))

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(value.nbytes for value in vars(self).values() if value is not None)


@dataclass
class Prediction:
    """One denoiser evaluation of B lanes."""

    x0: torch.Tensor  # (B, C, h, w) clean prediction, latents' dtype
    maps: torch.Tensor  # (B, tokens, h', w') float32 cross-attention of the conditional half; no tokens if not captured
    features: torch.Tensor  # (B, channels) float32, pooled activations of the network's middle


@dataclass(frozen=True)
class BackboneOptions:
    """How a pipeline's networks are held and run.

    Args:
        name, revision: where the pipeline came from.
        device: where the networks live.
        dtype_name: ``float32``, ``float16``, ``bfloat16``, of weights and latents.
        attention_stride: latent cells per attention cell, of the layers whose attention is read.
        channels_last: memory layout of the convolutions.
        compile: compile the denoiser's blocks and the decoder (``torch.compile``), once for all batch sizes.
        decode_memory: ceiling of what the autoencoder's activations take at a time, GiB; at least one picture is
            decoded at a time. None: half of a GPU's free memory, elsewhere 4.
        offload: networks wait on the host: ``none``, ``model`` (all but the one at work), ``sequential`` (all but the
            layer at work).
    """

    name: str
    revision: str | None = None
    device: str = "cpu"
    dtype_name: str = "float32"
    attention_stride: int = 4
    channels_last: bool = True
    compile: bool = False
    decode_memory: float | None = None
    offload: str = "none"
