"""Cross-attention: reading it from a U-Net while it runs, and turning it into a refinement mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

MASKS = ("low_attention", "neglected_token", "random", "grid", "full")


class AttentionRecord:
    """What `capture_cross_attention` saw: the sum over layers and heads of the attention rows."""

    def __init__(self) -> None:
        self._total: torch.Tensor | None = None
        self._layers = 0

    def add(self, probabilities: torch.Tensor) -> None:
        """Add one layer's (B, queries, tokens), averaged over heads."""
        self._total = probabilities if self._total is None else self._total + probabilities
        self._layers += 1

    def maps(self, height: int, width: int) -> torch.Tensor:
        """Attention maps (B, tokens, height, width); over the tokens of one query they sum to 1.

        Raises:
            RuntimeError: no layer was captured.
        """
        if self._total is None:
            raise RuntimeError("no cross-attention layer ran while attention was being captured")
        maps = (self._total / self._layers).transpose(1, 2)  # (B, tokens, queries)
        return maps.unflatten(2, (height, width))


class _CapturingProcessor:
    """A layer's own processor, which does the work, and beside it the probabilities of some lanes.

    What the network says is the same to the last bit whether it is looked at or not.
    """

    def __init__(self, record: AttentionRecord, processor: Any, lanes: slice) -> None:
        self.record, self.processor, self.lanes = record, processor, lanes

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = (
            layer(inputs[self.lanes]).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, tokens, dim)
            for layer, inputs in ((attn.to_q, hidden_states), (attn.to_k, context))
        )
        scores = query @ key.transpose(-1, -2) * attn.scale
        self.record.add(scores.float().softmax(-1).mean(1))
        return self.processor(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def cross_attention_layers(unet: nn.Module, blocks: tuple[str, ...]) -> list[str]:
    """Names of the U-Net's cross-attention modules inside the named blocks.

    Raises:
        ValueError: there is none.
    """
    names = [
        name
        for name, module in unet.named_modules()
        if name.endswith("attn2") and hasattr(module, "processor") and name.startswith(tuple(f"{b}." for b in blocks))
    ]
    if not names:
        raise ValueError(f"the U-Net has no cross-attention in {', '.join(blocks)}")
    return names


@contextmanager
def capture_cross_attention(unet: nn.Module, layers: list[str], lanes: slice) -> Iterator[AttentionRecord]:
    """While the context lasts, record the attention of ``layers`` for ``lanes`` of the batch.

    All other layers keep their fast kernels, and afterwards these have their own processors back.
    """
    record = AttentionRecord()
    modules = [unet.get_submodule(name) for name in layers]
    with _replaced_processors(modules, [_CapturingProcessor(record, m.processor, lanes) for m in modules]):
        yield record


@contextmanager
def _replaced_processors(modules: list[Any], substitutes: list[Any]) -> Iterator[None]:
    processors = [module.processor for module in modules]
    try:
        for module, substitute in zip(modules, substitutes, strict=True):
            module.processor = substitute
        yield
    finally:
        for module, processor in zip(modules, processors, strict=True):
            module.processor = processor


class _JointCapturingProcessor:
    """Flux's own processor, which does the work, and beside it the image-query x text-key rows."""

    def __init__(self, record: AttentionRecord, processor: Any) -> None:
        self.record, self.processor = record, processor

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        self.record.add(_text_rows(attn, hidden_states, encoder_hidden_states, image_rotary_emb))
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


def _text_rows(attn: Any, image: torch.Tensor, text: torch.Tensor, rotary: Any) -> torch.Tensor:
    """Softmax over text keys of image queries (B, queries, tokens), averaged over heads.

    Head by head, so that never more than one (B, queries, tokens) matrix is in memory.
    """
    query = attn.norm_q(attn.to_q(image).unflatten(-1, (-1, attn.head_dim)))  # (B, queries, heads, dim)
    key = attn.norm_added_k(attn.add_k_proj(text).unflatten(-1, (-1, attn.head_dim)))
    if rotary is not None:  # positions of the text come first
        tokens = text.shape[1]
        query = apply_rotary_emb(query, tuple(part[tokens:] for part in rotary), sequence_dim=1)
        key = apply_rotary_emb(key, tuple(part[:tokens] for part in rotary), sequence_dim=1)
    heads = query.shape[2]
    total = torch.zeros(*query.shape[:2], key.shape[1], device=query.device)
    for head in range(heads):
        scores = query[:, :, head] @ key[:, :, head].transpose(1, 2) * attn.head_dim**-0.5
        total += scores.float().softmax(-1)
    return total / heads


@contextmanager
def capture_joint_attention(transformer: Any, blocks: list[int]) -> Iterator[AttentionRecord]:
    """While the context lasts, record image-on-text attention of a Flux transformer's double-stream ``blocks``.

    The full joint matrix is never made: the blocks keep their fast kernels, and afterwards their own processors.
    """
    record = AttentionRecord()
    modules = [transformer.transformer_blocks[index].attn for index in blocks]
    with _replaced_processors(modules, [_JointCapturingProcessor(record, m.processor) for m in modules]):
        yield record


def content_maps(maps: torch.Tensor, content: torch.Tensor) -> torch.Tensor:
    """Renormalise ``maps`` (B, tokens, h, w) over content tokens only; ``content`` (B, tokens) is boolean.

    A token that is not content (BOS, EOS, padding) gets 0. Each content token's map is scaled to a
    largest value of 1, so that tokens with little total attention count as much as others.
    """
    kept = maps * content[:, :, None, None]
    peak = kept.amax((2, 3), keepdim=True)
    return kept / peak.clamp_min(1e-12)


def attention_entropy(maps: torch.Tensor, content: torch.Tensor) -> torch.Tensor:
    """Mean over content tokens of the spatial entropy of their maps, as a share of the maximum: (B,) in [0, 1]."""
    p = maps.flatten(2)  # (B, tokens, h*w)
    p = p / p.sum(-1, keepdim=True).clamp_min(1e-12)
    entropy = -(p * p.clamp_min(1e-12).log()).sum(-1) / math.log(p.shape[-1])
    weight = content.to(entropy.dtype)
    return (entropy * weight).sum(1) / weight.sum(1).clamp_min(1)


def refinement_mask(
    kind: str,
    maps: torch.Tensor,
    content: torch.Tensor,
    size: tuple[int, int],
    threshold: float = 0.5,
    blur_sigma: float = 1.0,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Where to re-denoise: (B, 1, h, w) in [0, 1] at the latents' ``size`` = (h, w), 1 = renew.

    ``maps`` (B, tokens, h', w') and ``content`` (B, tokens) as in `content_maps`. Kinds:
    ``low_attention``: below the ``threshold`` quantile of the largest attention over tokens;
    ``neglected_token``: where the least-attended content token would go, above the
    (1 - ``threshold``) quantile of its map; ``random``: above the quantile of smooth ``noise``
    (B, 1, h', w'); ``grid``: a checkerboard; ``full``: everything.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in MASKS:
        raise ValueError(f"unknown mask {kind!r}; known: {', '.join(MASKS)}")
    batch = maps.shape[0]
    if kind == "full":
        return torch.ones(batch, 1, *size, device=maps.device, dtype=torch.float32)
    if kind == "grid":
        rows, columns = (torch.arange(side, device=maps.device) * 4 // side for side in size)
        cell = ((rows[:, None] + columns) % 2).float()
        return gaussian_blur(cell.expand(batch, 1, *size), blur_sigma)
    field = _mask_field(kind, maps.float(), content, noise)  # (B, 1, h', w'), low = renew
    field = F.interpolate(field, size=size, mode="bilinear", align_corners=False)
    level = torch.quantile(field.flatten(1), threshold, dim=1)[:, None, None, None]
    return gaussian_blur((field <= level).float(), blur_sigma)


def _mask_field(kind: str, maps: torch.Tensor, content: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    if kind == "random":
        if noise is None:
            raise ValueError("mask 'random' needs noise")
        return gaussian_blur(noise.float(), 1.0)
    if kind == "low_attention":
        return content_maps(maps, content).amax(1, keepdim=True)
    # The token whose strongest response anywhere is weakest has been neglected (Chefer et al. 2023).
    peak = maps.amax((2, 3)).masked_fill(~content, torch.inf)
    return -maps[torch.arange(len(maps), device=maps.device), peak.argmin(1)].unsqueeze(1)


def gaussian_blur(picture: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur (B, C, h, w) with a Gaussian of ``sigma`` cells, edges replicated; 0 returns it unchanged."""
    if sigma <= 0:
        return picture
    radius = max(1, int(3 * sigma + 0.5))
    axis = torch.arange(-radius, radius + 1, device=picture.device, dtype=picture.dtype)
    kernel = torch.exp(-0.5 * (axis / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(picture.shape[1], 1, -1)
    for dim in (3, 2):
        pad = (radius, radius, 0, 0) if dim == 3 else (0, 0, radius, radius)
        weight = kernel[:, :, None, :] if dim == 3 else kernel[:, :, :, None]
        picture = F.conv2d(F.pad(picture, pad, mode="replicate"), weight, groups=picture.shape[1])
    return picture
