"""`PixelTextReward` stands in ImageReward's place (Xu et al. 2023) where pictures are small.

It is a transformer that looks at a picture and its prompt together and says, as one logit, whether they match.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTokenizer

from addiff_env.isolation import frozen_call
from addiff_env.loading import reason, resolve_model, shared
from addiff_env.preprocessing import check_pairs
from addiff_env.scorers.base import LOGIT_LIMIT, load_exactly, read_checkpoint

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
MODEL_TYPE = "pixel_text_reward"


class _Residual(nn.Module):
    """Two 3x3 convolutions with GroupNorm and SiLU beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class _Layer(nn.Module):
    """A pre-norm transformer encoder layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # (B, L, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, L, d)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class PixelTextReward(nn.Module):
    """A small verifier: picture and prompt to one logit, high where the picture satisfies the prompt.

    A convolutional stem turns a 64x64 picture into 8x8 tokens; these, the prompt's tokens and one
    learned read-out token pass through a transformer. ``score_mean`` and ``score_std`` are the
    logit's statistics on held-out generated pictures, for the record.
    """

    limit = LOGIT_LIMIT
    mean, std = 0.0, 1.0  # the reward takes the logit's own probability for quality

    def __init__(
        self,
        vocab_size: int,
        max_length: int = 32,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        channels: tuple[int, ...] = (48, 96),
        size: int = 64,
        score_mean: float = 0.0,
        score_std: float = 1.0,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "model_type": MODEL_TYPE,
            "vocab_size": vocab_size,
            "max_length": max_length,
            "width": width,
            "layers": layers,
            "heads": heads,
            "channels": list(channels),
            "size": size,
            "score_mean": score_mean,
            "score_std": score_std,
        }
        self.tokenizer: CLIPTokenizer | None = None
        self._tokens: dict[str, list[int]] = {}
        widths = [3, *channels, width]
        stages: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            stages += [nn.Conv2d(before, after, 3, stride=2, padding=1), _Residual(after)]
        self.stem = nn.Sequential(*stages)
        places = (size // 2 ** (len(widths) - 1)) ** 2
        self.place = nn.Parameter(torch.randn(places, width) * 0.02)
        self.readout = nn.Parameter(torch.randn(width) * 0.02)
        self.words = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.words.weight, std=0.3)
        self.order = nn.Parameter(torch.randn(max_length, width) * 0.02)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)

    def see(self, pictures: torch.Tensor) -> torch.Tensor:
        """Picture tokens (B, 64, width), row by row, of ``pictures`` (B, 3, 64, 64) in [0, 1]."""
        return self.stem(pictures * 2 - 1).flatten(2).transpose(1, 2) + self.place

    def mix(self, seen: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Everything mixed, (B, 1 + 64 + L, width): the read-out, the picture's tokens, the prompt's tokens.

        ``seen`` is what `see` made, ``ids`` (B, L) the token ids and ``mask`` (B, L) their padding mask.
        """
        batch = len(seen)
        text = self.words(ids) + self.order[: ids.shape[1]]
        tokens = torch.cat([self.readout.expand(batch, 1, -1), seen, text], 1)
        visible = torch.cat([mask.new_ones(batch, 1 + seen.shape[1], dtype=torch.bool), mask.bool()], 1)
        for layer in self.layers:
            tokens = layer(tokens, visible[:, None, None])
        return self.norm(tokens)

    def forward(self, pictures: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits (B,) of pictures (B, 3, 64, 64) in [0, 1]; ``ids`` and ``mask`` as `tokenize` gives them."""
        return self.head(self.mix(self.see(pictures), ids, mask)[:, 0]).squeeze(-1)

    def tokenize(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and padding mask (B, L), L the longest of these prompts; each prompt is tokenised once.

        Raises:
            RuntimeError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise RuntimeError("PixelTextReward has no tokenizer: load it with from_pretrained, or set .tokenizer")
        new = sorted({prompt for prompt in prompts if prompt not in self._tokens})
        if new:
            texts = self.tokenizer(new, truncation=True, max_length=self.config["max_length"]).input_ids
            self._tokens.update(zip(new, texts, strict=True))
        rows = [self._tokens[prompt] for prompt in prompts]
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        return ids, torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])

    @frozen_call
    def score(self, pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Logits (B,) float32 of pictures (B, 3, H, W) in [0, 1] under their prompts.

        Raises:
            TypeError, ValueError: as `check_pairs`.
        """
        texts = check_pairs(pictures, prompts)
        weight = self.head.weight
        size = self.config["size"]
        pictures = pictures.detach().to(weight.device, weight.dtype).clamp(0, 1)
        if pictures.shape[-2:] != (size, size):
            pictures = F.interpolate(pictures, (size, size), mode="bilinear", antialias=True)
        ids, mask = self.tokenize(texts)
        ids, mask = (tokens.to(weight.device, non_blocking=True) for tokens in (ids, mask))
        return self(pictures, ids, mask).float()

    def save_pretrained(self, folder: str | Path, tokenizer: CLIPTokenizer) -> None:
        """Write ``config.json``, fp16 ``model.safetensors`` and the tokenizer's files into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n")
        save_file({key: value.half().contiguous().cpu() for key, value in self.state_dict().items()}, folder / WEIGHTS)
        tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32) -> PixelTextReward:
        """Load a folder that `save_pretrained` wrote; frozen, in evaluation mode.

        Raises:
            FileNotFoundError: one of its files is missing.
            ValueError: one is damaged, or the weights are not those of this configuration; the message names it.
        """
        folder = Path(resolve_model(folder))
        for name in (CONFIG, WEIGHTS, TOKENIZER):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{(folder / name).absolute()} is missing: a reward folder holds {CONFIG}, {WEIGHTS} and "
                    f"{TOKENIZER}. The embedded world's comes with the package, or is made by: "
                    "addiff world train reward"
                )
        with _explained(folder / CONFIG):
            make = partial(cls, **_read_config(folder / CONFIG))
            with torch.device("meta"):
                make()  # does it fit the class at all?
        model = load_exactly(make, read_checkpoint(folder / WEIGHTS), folder / WEIGHTS)
        with _explained(folder / TOKENIZER):
            model.tokenizer = CLIPTokenizer.from_pretrained(folder)
        return model.to(torch_dtype)


@shared
def load_pixel_text_reward(folder: str | Path, device: str | torch.device = "cpu") -> PixelTextReward:
    """`PixelTextReward.from_pretrained` onto ``device``, laid out for fast convolutions."""
    return PixelTextReward.from_pretrained(folder).to(device=device, memory_format=torch.channels_last)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Name the file in whatever goes wrong with what it says."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} is damaged or not a PixelTextReward's: {reason(error)}") from error


def _read_config(path: Path) -> dict[str, Any]:
    """The arguments that ``path`` gives the model."""
    config = json.loads(path.read_text())
    if (kind := config.pop("model_type")) != MODEL_TYPE:
        raise ValueError(f"model_type is {kind!r}, not {MODEL_TYPE!r}")
    return config
