"""Per-image metrics, and the intervals of their means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from addiff_env.evaluation.benchmarks import Item
from addiff_env.perception import Perception
from addiff_env.tiny.checker import judge


def score_pictures(
    perception: Perception, pictures: np.ndarray, items: Sequence[Item]
) -> list[tuple[dict[str, float], str]]:
    """Scores and the checker's reason of pictures, uint8 (B, H, W, 3).

    ``success`` (0 or 1) and ``requirements`` (share met) are the checker's; ``clip_score`` and
    ``reward_score`` are those of the frozen models.
    """
    tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    look = perception.look(tensor.to(perception.device), [item.prompt for item in items])
    clip, reward = look.clip_score.tolist(), look.reward_score.tolist()
    verdicts = [judge(picture, item.prompt) for picture, item in zip(pictures, items, strict=True)]
    return [
        ({"success": float(v.satisfied), "requirements": v.score, "clip_score": c, "reward_score": r}, v.reason)
        for v, c, r in zip(verdicts, clip, reward, strict=True)
    ]


def wilson_interval(successes: int, number: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), 95% by default.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if number < 1 or not 0 <= successes <= number:
        raise ValueError(f"no share of {successes} in {number}")
    share, spread = successes / number, z * z / number
    centre = (share + spread / 2) / (1 + spread)
    half = z * np.sqrt(share * (1 - share) / number + spread / (4 * number)) / (1 + spread)
    return float(centre - half), float(centre + half)
