"""What the policy sees: looks at previews, and the observation made of them."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from addiff_env.backbones import count_flops
from addiff_env.encoders import load_clip, load_dino
from addiff_env.isolation import isolated
from addiff_env.paths import resolve_model
from addiff_env.preprocessing import vouched_pictures
from addiff_env.scorers import load_scorer

QUALITY = (
    "clip_score",
    "clip_delta",
    "reward_score",
    "reward_delta",
    "dino_similarity",
    "step_ratio",
    "nfe_ratio",
    "attention_entropy",
)
TIMESTEP_WIDTH = 128


def timestep_embedding(timesteps: torch.Tensor, width: int = TIMESTEP_WIDTH) -> torch.Tensor:
    """Sinusoidal embedding (B, width) of timesteps (B,), cosines first (as diffusers' U-Nets have it)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@dataclass
class Look:
    """What looking at pictures of B lanes showed; float32 on the device."""

    clip_image: torch.Tensor  # (B, clip width) unit vectors
    dino: torch.Tensor  # (B, dino width) unit vectors
    clip_score: torch.Tensor  # (B,) cosine of picture and prompt
    reward_score: torch.Tensor  # (B,) the reward model's score

    @classmethod
    def blank(cls, lanes: int, clip_width: int, dino_width: int, device: torch.device) -> Look:
        """Zeros, for lanes not looked at yet."""
        sizes = ((lanes, clip_width), (lanes, dino_width), (lanes,), (lanes,))
        return cls(*(torch.zeros(size, device=device) for size in sizes))

    def put(self, lanes: torch.Tensor, other: Look) -> None:
        """Overwrite some lanes, by index."""
        for name, value in vars(other).items():
            getattr(self, name)[lanes] = value


class Perception:
    """The frozen encoders and the reward model of one environment.

    Args:
        clip, dino: model folders (or ``addiff_env:<path>``), Hub ids, or what `addiff_env.encoders` lists.
        scorer: a setting of `addiff_env.scorers.load_scorer`.
        device: where they live.

    Attributes:
        score_limit: reward scores lie in [-score_limit, score_limit], so that the observation space is bounded.

    Raises:
        FileNotFoundError, ValueError: a model is missing or damaged; the message names it.
    """

    def __init__(self, clip: str, dino: str, scorer: str, device: torch.device) -> None:
        self.device = device
        self.clip = load_clip(resolve_model(clip), str(device))
        self.dino = load_dino(resolve_model(dino), str(device))
        self.scorer = load_scorer(scorer, str(device))
        self.score_limit = float(self.scorer.limit)
        self._flops: dict[tuple[Any, ...], float] = {}

    @property
    def parts(self) -> dict[str, int]:
        """Widths of the flat observation's parts, in order."""
        clip = self.clip.width
        return {"clip_image": clip, "clip_text": clip, "timestep": TIMESTEP_WIDTH, "quality": len(QUALITY)}

    @isolated()
    def look(self, pictures: torch.Tensor, prompts: list[str], vouched: bool = False) -> Look:
        """Encode and score pictures (B, 3, H, W) in [0, 1] of ``prompts`` (B).

        ``vouched`` says that the values are known to be finite and in range, which spares asking the device for them.
        """
        with vouched_pictures() if vouched else nullcontext():
            features = self.clip.image_features(pictures)
            return Look(
                features,
                self.dino.image_features(pictures),
                (features * self.clip.text_features(prompts)).sum(1),
                self.scorer.score(pictures, prompts).to(self.device).clamp(-self.score_limit, self.score_limit),
            )

    @isolated()
    def flops(self, height: int, width: int) -> float:
        """FLOPs of one look at one picture, preview decode not included; measured once per size."""
        if (height, width) not in self._flops:
            picture = torch.zeros(1, 3, height, width, device=self.device)
            self.look(picture, [""])  # caches the text's features, which are left out of the count
            self._flops[height, width] = count_flops(lambda: self.look(picture, [""]), self.device)
        return self._flops[height, width]

    @isolated()
    def verdict_flops(self, height: int, width: int) -> float:
        """FLOPs of the reward model's part of one look, preview decode not included; measured once per size."""
        key = ("verdict", height, width)
        if key not in self._flops:
            picture = torch.zeros(1, 3, height, width, device=self.device)
            self.scorer.score(picture, [""])  # caches the text's features, as in `flops`
            self._flops[key] = count_flops(lambda: self.scorer.score(picture, [""]), self.device)
        return self._flops[key]

    def text_flops(self) -> float:
        """FLOPs of reading one prompt, done once a lane: by CLIP, and by a scorer that reads apart from looking."""
        readers = {id(reader): reader for reader in (self.clip, getattr(self.scorer, "text_encoder", None)) if reader}
        return sum(self._reading_flops(reader) for reader in readers.values())

    def verdict_text_flops(self) -> float:
        """The part of `text_flops` that whoever asks the reward model alone has to pay."""
        reader = getattr(self.scorer, "text_encoder", None)
        return self._reading_flops(reader) if reader else 0.0

    def _reading_flops(self, reader: Any) -> float:
        return count_flops(partial(reader.encode_text, ""), self.device)
