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

from addiff_env.diffusion.objects import object_mask

MASKS = ("low_attention", "neglected_token", "neglected_object", "unattended", "random", "grid", "full")


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

    Every layer keeps its own processor and fast kernel; queries and keys are read where they are made. What the network
    says is the same to the last bit whether it is looked at or not.
    """
    record = AttentionRecord()
    with _hooked([hook for name in layers for hook in _cross_hooks(unet.get_submodule(name), record, lanes)]):
        yield record


@contextmanager
def capture_joint_attention(transformer: Any, blocks: list[int]) -> Iterator[AttentionRecord]:
    """While the context lasts, record image-on-text attention of a Flux transformer's double-stream ``blocks``.

    As `capture_cross_attention`; the full joint matrix is never made.
    """
    record = AttentionRecord()
    attentions = [transformer.transformer_blocks[index].attn for index in blocks]
    with _hooked([hook for attn in attentions for hook in _joint_hooks(attn, record)]):
        yield record


@contextmanager
def _hooked(hooks: list[Any]) -> Iterator[None]:
    """Remove the hooks when the context ends, however it ends."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _cross_hooks(attn: Any, record: AttentionRecord, lanes: slice) -> list[Any]:
    """Hooks that add the probabilities of one cross-attention layer to ``record`` whenever it runs."""
    queries: list[torch.Tensor] = []

    def see_query(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        queries.append(output[lanes])

    def see_key(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        query, key = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (queries.pop(), output[lanes]))
        if attn.upcast_attention:  # as such models' own attention does: their scores overflow in float16
            query, key = query.float(), key.float()
        scores = query * attn.scale @ key.transpose(-1, -2)  # (B, heads, queries, tokens)
        record.add(scores.float().softmax(-1).mean(1))

    return [attn.to_q.register_forward_hook(see_query), attn.to_k.register_forward_hook(see_key)]


def _joint_hooks(attn: Any, record: AttentionRecord) -> list[Any]:
    """Hooks that add the image-query x text-key rows of one double-stream block to ``record`` whenever it runs."""
    seen: dict[str, Any] = {}

    def see_positions(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen["rotary"] = kwargs.get("image_rotary_emb")

    def see_query(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        seen["query"] = output

    def see_key(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        record.add(_text_rows(seen.pop("query"), output, seen.pop("rotary")))

    return [
        attn.register_forward_pre_hook(see_positions, with_kwargs=True),
        attn.norm_q.register_forward_hook(see_query),
        attn.norm_added_k.register_forward_hook(see_key),
    ]


def _text_rows(query: torch.Tensor, key: torch.Tensor, rotary: Any) -> torch.Tensor:
    """Softmax over text keys (B, tokens, heads, dim) of image queries (B, queries, heads, dim), averaged over heads.

    Head by head, so that never more than one (B, queries, tokens) matrix is in memory.
    """
    if rotary is not None:  # positions of the text come first
        tokens = key.shape[1]
        query = apply_rotary_emb(query, tuple(part[tokens:] for part in rotary), sequence_dim=1)
        key = apply_rotary_emb(key, tuple(part[:tokens] for part in rotary), sequence_dim=1)
    heads, scale = query.shape[2], query.shape[3] ** -0.5
    total = torch.zeros(*query.shape[:2], key.shape[1], device=query.device)
    for head in range(heads):
        scores = query[:, :, head] * scale @ key[:, :, head].transpose(1, 2)
        total += scores.float().softmax(-1)
    return total / heads


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
    entropy = -(p * p.clamp_min(1e-12).log()).sum(-1) / math.log(max(2, p.shape[-1]))  # of a single cell it is 0
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
    (1 - ``threshold``) quantile of its map; ``neglected_object``: the objects that words point to whose attention is
    below ``threshold`` times the best one's, and ``unattended``: everything but the others, both without cutting an
    object (`addiff_env.diffusion.objects.object_mask`), and empty where nothing is neglected; ``random``: above the
    quantile of smooth ``noise`` (B, 1, h', w'); ``grid``: a checkerboard; ``full``: everything.

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
    if kind in ("neglected_object", "unattended"):
        return gaussian_blur(object_mask(maps, content, size, threshold, kind == "unattended"), blur_sigma)
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
