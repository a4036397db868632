"""Pictures of a split, checked, with their previews and attention: what the quality bars look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

from addiff_env.diffusion.backbones import Backbone, Prediction, denoise, initial_noise, to_uint8
from addiff_env.tiny.checker import MIN_CHROMA, CheckResult, Found, check_picture
from addiff_env.tiny.prompts import CATEGORIES
from addiff_env.tiny.scenes import SIZE
from addiff_env.tiny.world import latent_shape

PREVIEW_REACH = 3  # pixels around a preview's coloured regions


def pick(rows: Sequence[dict[str, Any]], per_category: int | None) -> list[dict[str, Any]]:
    """The first ``per_category`` rows of each category of a split; None takes all."""
    groups = [[row for row in rows if row["category"] == category][:per_category] for category in CATEGORIES]
    return [row for group in groups for row in group]


def early_step(num_inference_steps: int) -> int:
    """Index of the evaluation that ends the first third of the schedule."""
    return max(1, round(num_inference_steps / 3)) - 1


@dataclass(frozen=True)
class Sample:
    """A generated picture's verdict, and what is looked at along the way."""

    row: dict[str, Any]  # prompt, seed, category
    result: CheckResult  # of the final picture
    preview: np.ndarray  # (64, 64, 3) uint8, the decoded x0 at one third of the schedule
    early_maps: torch.Tensor  # (tokens, h, w) cross-attention there
    last_maps: torch.Tensor  # (tokens, h, w) cross-attention of the last step


def generate(
    backbone: Backbone, rows: Sequence[dict[str, Any]], steps: int, guidance: float, batch: int = 64
) -> list[Sample]:
    """Generate and judge the pictures of a split's ``rows`` with DDIM."""
    chunks = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    samples: list[Sample] = []
    with tqdm(total=len(chunks) * steps, desc=f"DDIM-{steps}, guidance {guidance:g}") as progress:
        for chunk in chunks:
            samples += _generate_batch(backbone, chunk, steps, guidance, progress)
    return samples


def _generate_batch(
    backbone: Backbone, rows: Sequence[dict[str, Any]], steps: int, guidance: float, progress: tqdm
) -> list[Sample]:
    schedule = backbone.schedule(steps, latent_shape(backbone))
    noise = initial_noise(backbone, latent_shape(backbone), [row["seed"] for row in rows])
    predictions: dict[int, Prediction] = {}

    def watch(index: int, latents: torch.Tensor, now: Prediction) -> None:
        if index in looks:
            predictions[index] = now
        progress.update()

    looks = (early_step(steps), steps - 1)
    latents = denoise(backbone, schedule, [row["prompt"] for row in rows], noise, guidance, watch, looks)
    early, last = (predictions[index] for index in looks)
    pictures, previews = to_uint8(backbone.decode(latents)), to_uint8(backbone.decode(early.x0))
    results = [check_picture(picture, row["prompt"]) for picture, row in zip(pictures, rows, strict=True)]
    return list(map(Sample, rows, results, previews, early.maps.cpu(), last.maps.cpu()))


def coloured_region(picture: np.ndarray) -> np.ndarray:
    """Where a preview (64, 64, 3) uint8 shows objects: coloured pixels, those near them, and the holes of rings."""
    rgb = picture.astype(np.float64) / 255
    axis = np.arange(-PREVIEW_REACH, PREVIEW_REACH + 1)
    disc = np.add.outer(axis**2, axis**2) <= PREVIEW_REACH**2
    return ndimage.binary_fill_holes(ndimage.binary_dilation(rgb.max(-1) - rgb.min(-1) > MIN_CHROMA, disc))


def foreshadowed(objects: Sequence[Found], region: np.ndarray) -> list[bool]:
    """Which objects of the final picture have their centre in the preview's ``region`` (64, 64) bool."""
    return [bool(region[min(SIZE - 1, int(item.y)), min(SIZE - 1, int(item.x))]) for item in objects]
