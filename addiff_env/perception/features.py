"""What the policy sees: looks at previews, and the observation made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from addiff_env.loading.flops import count_flops
from addiff_env.loading.isolation import isolated
from addiff_env.loading.paths import resolve_model
from addiff_env.perception.encoders import load_clip, load_dino
from addiff_env.perception.preprocessing import unvalidated_pictures
from addiff_env.perception.scorers import ScorerOfLatents, load_scorer, reads_latents

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
LOOK_PARTS = ("clip_image", "clip_text", "dino", "reward")  # of a look, what ``reads`` may name


def timestep_embedding(timesteps: torch.Tensor, width: int = TIMESTEP_WIDTH) -> torch.Tensor:
    """Sinusoidal embedding (B, width) of timesteps (B,), cosines first (as diffusers' U-Nets have it)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@dataclass
class Features:
    """What looking at pictures of B lanes showed; float32 on the device."""

    clip_image: torch.Tensor  # (B, clip width) unit vectors
    dino: torch.Tensor  # (B, dino width) unit vectors
    clip_score: torch.Tensor  # (B,) cosine of picture and prompt
    reward_score: torch.Tensor  # (B,) the reward model's score; of a scorer of latents, that of stopping here
    outlook: torch.Tensor  # (B,) a scorer of latents' score of going on to the end of the schedule; 0 with others

    @classmethod
    def blank(cls, lanes: int, clip_width: int, dino_width: int, device: torch.device) -> Features:
        """Zeros, for lanes not looked at yet."""
        sizes = ((lanes, clip_width), (lanes, dino_width), (lanes,), (lanes,), (lanes,))
        return cls(*(torch.zeros(size, device=device) for size in sizes))

    def at(self, lanes: torch.Tensor) -> Features:
        """Those of some lanes, by index."""
        return Features(*(value[lanes] for value in vars(self).values()))

    def put(self, lanes: torch.Tensor, other: Features) -> None:
        """Overwrite some lanes, by index."""
        for name, value in vars(other).items():
            getattr(self, name)[lanes] = value


@dataclass
class Latents:
    """What a scorer of latents is asked about B lanes."""

    x0: torch.Tensor  # (B, C, h, w) clean predictions, or finished latents
    timesteps: torch.Tensor  # (B,) where they stand, on the host; 0: finished
    evaluations: torch.Tensor  # (B, 2) that stopping here and going on to the end would still take


def look_precision(setting: str, device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """What looks are computed in: by ``auto`` a GPU's model's own half precision, else (None) strict float32."""
    half = setting == "auto" and device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    return dtype if half else None


class Perception:
    """The frozen encoders and the reward model of one environment.

    Args:
        clip, dino: model folders (or ``addiff_env:<path>``), Hub ids, or what `addiff_env.perception.encoders` lists.
        scorer: a setting of `addiff_env.perception.scorers.load_scorer`.
        device: where they live.
        precision: ``float16`` or ``bfloat16``: looks are computed in it (autocast, as the scorers' official code does
            on GPUs), texts and results stay float32. None: strict float32.
        reads: which of `LOOK_PARTS` are looked at; the others cost nothing and are 0.
        encode: pictures (B, 3, H, W) to latents, with which a scorer of latents can score pictures.

    Attributes:
        reads_latents: whether the scorer is one of latents.
        reads_pictures: whether anything that is read needs a decoded picture.
        score_limit: reward scores lie in [-score_limit, score_limit], so that the observation space is bounded.

    Raises:
        FileNotFoundError, ValueError: a model is missing or damaged; the message names it.
    """

    def __init__(
        self,
        clip: str,
        dino: str,
        scorer: str,
        device: torch.device,
        precision: torch.dtype | None = None,
        reads: Sequence[str] = LOOK_PARTS,
        encode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.device, self.precision, self.reads = device, precision, frozenset(reads)
        self.clip = load_clip(resolve_model(clip), str(device))
        self.dino = load_dino(resolve_model(dino), str(device))
        loaded: Any = load_scorer(scorer, str(device))
        self.reads_latents = reads_latents(loaded)
        self.scorer: Any = ScorerOfLatents(loaded, encode) if self.reads_latents and encode is not None else loaded
        scores_pictures = "reward" in self.reads and not self.reads_latents
        self.reads_pictures = scores_pictures or bool({"clip_image", "dino"} & self.reads)
        self.score_limit = float(self.scorer.limit)
        self._flops: dict[tuple[Any, ...], float] = {}

    @property
    def parts(self) -> dict[str, int]:
        """Widths of the flat observation's parts, in order."""
        clip, outlook = self.clip.width, {"outlook": 1} if self.reads_latents else {}
        return {"clip_image": clip, "clip_text": clip, "timestep": TIMESTEP_WIDTH, **outlook, "quality": len(QUALITY)}

    @isolated()
    def look(
        self,
        pictures: torch.Tensor | None,
        prompts: list[str],
        skip_validation: bool = False,
        latents: Latents | None = None,
    ) -> Features:
        """Encode and score pictures (B, 3, H, W) in [0, 1] of ``prompts`` (B), as far as they are read.

        ``skip_validation`` says that the values are known to be finite and in range, which spares asking the device for
        them. With a scorer of latents ``latents`` say what it is asked; without them it scores the pictures as finished
        ones. ``pictures`` may be None where nothing that is read needs them.
        """
        features = Features.blank(len(prompts), self.clip.width, self.dino.width, self.device)
        texts = self.clip.text_features(prompts) if "clip_image" in self.reads else None
        if reader := getattr(self.scorer, "text_encoder", None):
            reader.text_features(prompts)  # kept by the encoder, which others share: never in half precision
        with unvalidated_pictures() if skip_validation else nullcontext(), self._half_precision():
            if texts is not None:
                features.clip_image = self.clip.image_features(pictures).float()
            if "dino" in self.reads:
                features.dino = self.dino.image_features(pictures).float()
            if "reward" in self.reads:
                self._score(features, pictures, prompts, latents)
        if texts is not None:
            features.clip_score = (features.clip_image * texts).sum(1)
        return features

    def _score(
        self, features: Features, pictures: torch.Tensor | None, prompts: list[str], latents: Latents | None
    ) -> None:
        """Let the reward model score, into ``features``."""
        if not self.reads_latents:
            features.reward_score = self._limited(self.scorer.score(pictures, prompts))
        elif latents is None:
            features.reward_score = features.outlook = self._limited(self.scorer.score(pictures, prompts))
        else:
            scores = self.scorer.score_latents(latents.x0, prompts, latents.timesteps, latents.evaluations)
            features.reward_score, features.outlook = self._limited(scores).unbind(1)

    def _limited(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores on the device, within the limit."""
        return scores.float().to(self.device).clamp(-self.score_limit, self.score_limit)

    def _half_precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.precision is None else torch.autocast(self.device.type, self.precision)

    @isolated()
    def flops(self, height: int, width: int) -> float:
        """FLOPs of one look at one picture, preview decode not included; measured once per size."""
        if (height, width) not in self._flops:
            picture, latents = torch.zeros(1, 3, height, width, device=self.device), self._blank_latents()
            self.look(picture, [""], latents=latents)  # caches the text's features, which are left out of the count
            self._flops[height, width] = count_flops(lambda: self.look(picture, [""], latents=latents), self.device)
        return self._flops[height, width]

    @isolated()
    def scorer_flops(self, height: int, width: int) -> float:
        """FLOPs of the reward model's part of one look, preview decode not included; measured once per size."""
        key = ("scorer", height, width)
        if key not in self._flops:
            features, latents = Features.blank(1, 0, 0, self.device), self._blank_latents()
            picture = torch.zeros(1, 3, height, width, device=self.device)
            self._score(features, picture, [""], latents)  # caches the text's features, as in `flops`
            self._flops[key] = count_flops(lambda: self._score(features, picture, [""], latents), self.device)
        return self._flops[key]

    def _blank_latents(self) -> Latents | None:
        """One lane's question to a scorer of latents; None for others."""
        if not self.reads_latents:
            return None
        asked = torch.ones(1, 2, dtype=torch.long)  # timestep 0 would be a finished picture
        latents = torch.zeros(1, *self.scorer.latent_shape, device=self.device)
        return Latents(latents, asked[:, 0], asked.to(self.device))

    def text_flops(self) -> float:
        """FLOPs of reading one prompt, done once a lane: by CLIP, and by a scorer that reads apart from looking."""
        clip = self.clip if {"clip_image", "clip_text"} & self.reads else None
        readers = {id(reader): reader for reader in (clip, getattr(self.scorer, "text_encoder", None)) if reader}
        return sum(self._reading_flops(reader) for reader in readers.values())

    def forget_texts(self) -> None:
        """Read every text anew from here on, as if none had been seen."""
        for reader in (self.clip, getattr(self.scorer, "text_encoder", None)):
            if reader is not None:
                reader.forget_texts()

    def scorer_text_flops(self) -> float:
        """The part of `text_flops` that a policy which reads the reward model alone pays."""
        reader = getattr(self.scorer, "text_encoder", None)
        return self._reading_flops(reader) if reader else 0.0

    def _reading_flops(self, reader: Any) -> float:
        """Counted once, without a lock: who counts waits for those who compute, and they may ask for the same."""
        key = ("text", id(reader))
        if key not in self._flops:
            self._flops[key] = count_flops(partial(reader.encode_text, ""), self.device)
        return self._flops[key]
