"""The reward, as pure functions: r = shaping + instability + efficiency + terminal + fault.

Shaping is potential-based (Ng, Harada & Russell 1999), so it guides learning and pays nothing for mere
continuing; instability is a penalty only; every further evaluation costs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

COMPONENTS = ("shaping", "instability", "efficiency", "terminal", "fault")


@dataclass(frozen=True)
class RewardConfig:
    """Weights and fixed scales of the reward.

    A score s enters as its quality sigmoid((s - mean) / std) in (0, 1), so that weights compare
    between scorers. For a verifier that predicts a logit, mean 0 and std 1 give its probability.
    """

    clip_weight: float = 0.2  # of the CLIP score, in the potential and in the terminal quality
    reward_weight: float = 0.8  # of the reward model's score, likewise
    clip_mean: float = 0.25  # CLIP cosine that counts as quality 0.5
    clip_std: float = 0.05  # spread of the CLIP cosine
    reward_mean: float = 0.0  # reward-model score that counts as quality 0.5
    reward_std: float = 1.0  # spread of the reward model's score
    shaping: float = 1.0  # weight of gamma * Phi(s') - Phi(s)
    gamma: float = 1.0  # discount that shaping assumes; must equal the learner's
    instability: float = 0.02  # weight of the penalty 1 - DINO similarity of successive previews
    efficiency: float = 0.01  # c_nfe: cost of one denoiser evaluation
    terminal: float = 1.0  # weight of the final image's quality
    fault: float = 1.0  # penalty of a lane whose numbers stopped being finite; it gets no terminal quality

    @classmethod
    def from_dict(cls, values: dict[str, Any] | None) -> RewardConfig:
        """Build from a mapping of weights; what is left out keeps its default.

        Raises:
            ValueError: an unknown name, or a value that is not a finite number.
        """
        values = values or {}
        known = [f.name for f in fields(cls)]
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"unknown reward setting {name!r}; known: {', '.join(known)}")
            if not isinstance(value, (int, float)) or not np.isfinite(value):
                raise ValueError(f"reward setting {name!r} must be a finite number, got {value!r}")
        return cls(**values)


def quality(clip_score: np.ndarray, reward_score: np.ndarray, config: RewardConfig) -> np.ndarray:
    """Weighted quality (B,) of pictures from their scores (B,); the potential Phi of a state."""
    clip = _sigmoid((clip_score - config.clip_mean) / config.clip_std)
    reward = _sigmoid((reward_score - config.reward_mean) / config.reward_std)
    return config.clip_weight * clip + config.reward_weight * reward


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x, dtype=np.float64)))


def step_reward(
    config: RewardConfig,
    phi: np.ndarray,
    next_phi: np.ndarray,
    similarity: np.ndarray,
    nfe: np.ndarray,
    terminated: np.ndarray,
    fault: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Components and ``total`` of one transition of B lanes, each (B,) float64.

    ``phi`` and ``next_phi`` are the qualities of the preview before and of the preview (or the final
    image) after; ``similarity`` the DINO cosine between the two; ``nfe`` the evaluations just paid.
    The potential of a terminal state is 0, as the theorem requires. ``fault`` (B,) bool marks lanes that broke down.
    """
    broken = np.zeros_like(terminated) if fault is None else fault
    after = np.where(terminated, 0.0, next_phi)
    parts = {
        "shaping": config.shaping * (config.gamma * after - phi),
        "instability": -config.instability * (1 - similarity),
        "efficiency": -config.efficiency * nfe.astype(np.float64),
        "terminal": np.where(terminated & ~broken, config.terminal * next_phi, 0.0),
        "fault": np.where(broken, -config.fault, 0.0),
    }
    return parts | {"total": sum(parts.values())}
