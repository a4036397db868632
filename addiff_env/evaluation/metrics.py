"""Per-image metrics."""

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
