"""What a metric is, and how pictures are scored by several."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch

from addiff_env.evaluation.benchmarks.items import Item

Scored = tuple[dict[str, float], str]  # a picture's scores, and words about them
_CHUNK = 16  # pictures that a model sees at a time


class Metric(Protocol):
    """Scores pictures one by one."""

    name: str

    def columns(self, item: Item) -> tuple[str, ...]:
        """Names of the scores that a picture of ``item`` gets; none where the metric does not apply."""

    def score(self, pictures: np.ndarray, items: Sequence[Item]) -> list[Scored]:
        """Scores of pictures, uint8 (B, H, W, 3), of items that it applies to."""


def score_pictures(metrics: Sequence[Metric], pictures: np.ndarray, items: Sequence[Item]) -> list[Scored]:
    """Every metric's scores, and joined words, of pictures uint8 (B, H, W, 3).

    A score that is not finite is none: the words say so (`unmeasured`).
    """
    scores: list[dict[str, float]] = [{} for _ in items]
    words: list[list[str]] = [[] for _ in items]
    for metric in metrics:
        rows = [row for row, item in enumerate(items) if metric.columns(item)]
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            found = metric.score(pictures[part], [items[row] for row in part])
            for row, (values, said) in zip(part, found, strict=True):
                finite = {name: value for name, value in values.items() if math.isfinite(value)}
                scores[row] |= finite
                words[row] += [said] if said else []
                words[row] += [f"{unmeasured(name)} ({values[name]})" for name in values if name not in finite]
    return [(values, "; ".join(said)) for values, said in zip(scores, words, strict=True)]


def unmeasured(name: str) -> str:
    """What a row's words say where its picture got no finite score."""
    return f"no finite {name}"


def columns_of(metrics: Sequence[Metric], item: Item) -> tuple[str, ...]:
    """Names of all scores that a picture of ``item`` gets."""
    return tuple(dict.fromkeys(name for metric in metrics for name in metric.columns(item)))


def category_means(scores: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Mean score of every category."""
    by: dict[str, list[float]] = {}
    for category, score in scores:
        by.setdefault(category, []).append(score)
    return {category: float(np.mean(values)) for category, values in by.items()}


def as_tensor(pictures: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Pictures uint8 (B, H, W, 3) as float32 (B, 3, H, W) in [0, 1] on ``device``."""
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255).to(device)
