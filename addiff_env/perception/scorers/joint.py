"""What the embedded world's verifiers share: a transformer that reads a picture's tokens and its prompt together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn
from transformers import CLIPTokenizer

from addiff_env.loading.damage import wrong_at
from addiff_env.loading.paths import resolve_model
from addiff_env.loading.weights import check_tokenizer, reason
from addiff_env.perception.scorers.base import LOGIT_LIMIT, load_exactly, read_checkpoint

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
Reader = TypeVar("Reader", bound="JointReader")
_CACHED_PROMPTS = 4096  # kept; prompts repeat within an evaluation, not for ever


class Residual(nn.Module):
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
        """(B, channels, h, w) to the same shape."""
        return x + self.body(x)


class Layer(nn.Module):
    """A pre-norm transformer encoder layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, L, width) to the same shape; ``mask`` (B, 1, 1, L) bool says which tokens are seen."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # (B, L, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, L, d)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def stored_model_type(folder: str | Path) -> str:
    """The ``model_type`` that a folder's configuration names; empty where there is none to read."""
    try:
        config = json.loads((Path(folder) / CONFIG).read_text())
    except (OSError, ValueError):  # opening the folder says what is wrong with it
        return ""
    return str(config.get("model_type", "")) if isinstance(config, dict) else ""


def arguments_of(scope: dict[str, Any]) -> dict[str, Any]:
    """A constructor's arguments, from its ``locals()`` in its first line: what describes the model on disk."""
    return {name: value for name, value in scope.items() if name not in ("self", "__class__")}


class JointReader(nn.Module):
    """One learned read-out token, a picture's tokens and the prompt's tokens, mixed by a transformer.

    Subclasses pass what makes tokens of a picture, the ``stem``, and read the mixed tokens. Their constructor's
    arguments are what ``config`` holds and ``config.json`` keeps.

    Args:
        config: the subclass's arguments, among them ``vocab_size``, ``max_length``, ``width``, ``layers``, ``heads``.
        stem: (B, C, h, w) to (B, width, h', w').
        places: h' w'.
    """

    limit = LOGIT_LIMIT
    mean, std = 0.0, 1.0  # the reward takes the logit's own probability for quality
    model_type: ClassVar[str]
    recipe: ClassVar[str]  # that makes the weights: addiff world train <recipe>

    def __init__(self, config: dict[str, Any], stem: nn.Module, places: int) -> None:
        super().__init__()
        self.config = {"model_type": self.model_type, **config}
        self.tokenizer: CLIPTokenizer | None = None
        self._tokens: dict[str, list[int]] = {}
        self._latest: tuple[list[str], torch.Tensor, torch.Tensor] | None = None  # prompts, and what `_read` gave
        width = config["width"]
        self.stem = stem
        self.place = nn.Parameter(torch.randn(places, width) * 0.02)
        self.readout = nn.Parameter(torch.randn(width) * 0.02)
        self.words = nn.Embedding(config["vocab_size"], width)
        nn.init.normal_(self.words.weight, std=0.3)
        self.order = nn.Parameter(torch.randn(config["max_length"], width) * 0.02)
        self.layers = nn.ModuleList(Layer(width, config["heads"]) for _ in range(config["layers"]))
        self.norm = nn.LayerNorm(width)

    def mix(self, seen: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Everything mixed, (B, 1 + places + L, width): the read-out, the picture's tokens, the prompt's tokens.

        ``seen`` (B, places, width) are the picture's tokens, ``ids`` (B, L) the prompt's and ``mask`` (B, L) their
        padding mask.
        """
        batch = len(seen)
        text = self.words(ids) + self.order[: ids.shape[1]]
        tokens = torch.cat([self.readout.expand(batch, 1, -1), seen, text], 1)
        visible = torch.cat([mask.new_ones(batch, 1 + seen.shape[1], dtype=torch.bool), mask.bool()], 1)
        for layer in self.layers:
            tokens = layer(tokens, visible[:, None, None])
        return self.norm(tokens)

    def tokenize(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and padding mask (B, L), L the longest of these prompts; each prompt is tokenised once.

        Raises:
            RuntimeError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            name = type(self).__name__
            raise RuntimeError(f"{name} has no tokenizer: load it with from_pretrained, or set .tokenizer")
        if len(self._tokens) > _CACHED_PROMPTS:
            self._tokens.clear()
        new = sorted({prompt for prompt in prompts if prompt not in self._tokens})
        if new:
            texts = self.tokenizer(new, truncation=True, max_length=self.config["max_length"]).input_ids
            self._tokens.update(zip(new, texts, strict=True))
        rows = [self._tokens[prompt] for prompt in prompts]
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        return ids, torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])

    def _read(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """`tokenize`, on the weights' device; sent again when other prompts are read, which is seldom."""
        device = self.readout.device
        if self._latest is None or self._latest[0] != prompts or self._latest[1].device != device:
            ids, mask = (values.to(device, non_blocking=True) for values in self.tokenize(prompts))
            self._latest = list(prompts), ids, mask
        return self._latest[1:]

    def save_pretrained(self, folder: str | Path, tokenizer: CLIPTokenizer) -> None:
        """Write ``config.json``, fp16 ``model.safetensors`` and the tokenizer's files into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n")
        weights = {key: value.half().contiguous().cpu() for key, value in self.state_dict().items()}
        (folder / WEIGHTS).write_bytes(save(weights))
        tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls: type[Reader], folder: str | Path) -> Reader:
        """Load a folder that `save_pretrained` wrote; frozen, in evaluation mode.

        Raises:
            FileNotFoundError: one of its files is missing.
            ValueError: one is damaged, or the weights are not those of this configuration; the message names it.
        """
        folder = Path(resolve_model(folder))
        for name in (CONFIG, WEIGHTS, TOKENIZER):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{(folder / name).absolute()} is missing: a {cls.__name__}'s folder holds {CONFIG}, {WEIGHTS} and "
                    f"{TOKENIZER}. The embedded world's comes with the package, or is made by: "
                    f"addiff world train {cls.recipe}"
                )
        with cls._explained(folder / CONFIG):
            make = partial(cls, **cls._read_config(folder / CONFIG))
            with torch.device("meta"):
                make()  # does it fit the class at all?
        model = load_exactly(make, read_checkpoint(folder / WEIGHTS), folder / WEIGHTS)
        with cls._explained(folder / TOKENIZER):
            model.tokenizer = CLIPTokenizer.from_pretrained(folder)
            check_tokenizer(model.tokenizer, folder)
        return model

    @classmethod
    @contextmanager
    def _explained(cls, path: Path) -> Iterator[None]:
        """Name the file in whatever goes wrong with what it says."""
        try:
            yield
        except Exception as error:
            raise ValueError(
                f"{path} is damaged or not a {cls.__name__}'s: {reason(error)}{wrong_at(path.parent)}"
            ) from error

    @classmethod
    def _read_config(cls, path: Path) -> dict[str, Any]:
        """The arguments that ``path`` gives the model."""
        config = json.loads(path.read_text())
        if (kind := config.pop("model_type")) != cls.model_type:
            raise ValueError(f"model_type is {kind!r}, not {cls.model_type!r}")
        return config
