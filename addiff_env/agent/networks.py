"""The policy's network, and the normalisation in front of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from addiff_env.types import Action

PART_NORM = 2.0  # root-mean-square length of every normalised part
PRICE_STATISTICS = (0.0, 3**-0.5)  # mean and deviation of what is uniform in [-1, 1]
CALIBRATION_SHARES = (0.8, 0.08, 0.12)  # continue, stop, refine


class PartNorm(nn.Module):
    """Standardise an observation with fixed statistics, then scale each part to length `PART_NORM`.

    768-wide features and 8 quality numbers then reach the first layer with the same total power.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    root_widths: torch.Tensor

    def __init__(self, parts: dict[str, int]) -> None:
        super().__init__()
        width = sum(parts.values())
        self.parts = dict(parts)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        widths = torch.cat([torch.full((n,), float(n)) for n in parts.values()])
        self.register_buffer("root_widths", widths.sqrt(), persistent=False)

    def set_statistics(
        self, mean: torch.Tensor, std: torch.Tensor, gains: Mapping[str, float | None] | None = None
    ) -> None:
        """Fix the statistics (width,) of the observations; a slot that never varies is left out (scale 0).

        ``gains`` lengthen parts: where it is 3, three times `PART_NORM`, and clipped to a third as many deviations.
        None takes back what a preset says.

        Raises:
            ValueError: a gain of a part that there is not, or one that is not positive.
        """
        given = {name: gain for name, gain in (gains or {}).items() if gain is not None}
        if wrong := {name: gain for name, gain in given.items() if name not in self.parts or not gain > 0}:
            raise ValueError(f"gains must be positive numbers of the parts {list(self.parts)}, got {wrong}")
        varies = std > 1e-6
        self.mean.copy_(mean)
        gain = torch.cat([torch.full((n,), float(given.get(name, 1.0))) for name, n in self.parts.items()]).to(std)
        scale = gain * PART_NORM / (std.clamp_min(1e-6) * self.root_widths)
        self.scale.copy_(torch.where(varies, scale, torch.zeros_like(std)))

    def calibrate(
        self,
        reset: Callable[[], np.ndarray],
        step: Callable[[np.ndarray], np.ndarray],
        steps: int,
        probabilities: Sequence[float],
        seed: int,
        gains: Mapping[str, float | None] | None = None,
    ) -> None:
        """Fix the statistics from ``steps`` steps of a random policy with these action shares.

        ``reset`` gives the lanes' first observations (B, width), ``step`` those that follow actions (B,).

        Raises:
            ValueError: as `set_statistics`.
        """
        rng = np.random.default_rng(seed)
        observations = [np.asarray(reset())]
        for _ in range(steps):
            actions = rng.choice(len(Action), size=len(observations[0]), p=probabilities)
            observations.append(np.asarray(step(actions)))
        seen = torch.as_tensor(np.concatenate(observations))
        mean, std = seen.mean(0), seen.std(0)
        if "price" in self.parts:  # drawn once an episode: too seldom to tell
            names = [name for name, width in self.parts.items() for _ in range(width)]
            mean[names.index("price")], std[names.index("price")] = PRICE_STATISTICS
        self.set_statistics(mean, std, gains)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Observations (B, width) to normalised ones, clipped to 10 standard deviations (by a gain, to fewer)."""
        limit = 10 * PART_NORM / self.root_widths
        return ((observations - self.mean) * self.scale).clamp(-limit, limit)


class PolicyNet(nn.Module):
    """The policy: part-wise normalisation and a two-layer MLP to the actions' logits."""

    def __init__(self, parts: dict[str, int], hidden: int = 128) -> None:
        super().__init__()
        width = sum(parts.values())
        self.norm = PartNorm(parts)
        self.body = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.head = nn.Linear(hidden, len(Action))

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Observations (B, width) float32 to logits (B, 3)."""
        return self.head(self.body(self.norm(observations)))


def flat_observation(observation: Any, parts: Iterable[str]) -> Any:
    """An observation of ``obs_mode`` dict as the flat one, (B, width): its ``parts`` one after another.

    Anything but a mapping is flat already and comes back as it is.

    Raises:
        ValueError: a part is missing; the message names it.
    """
    if not isinstance(observation, Mapping):
        return observation
    if missing := [name for name in parts if name not in observation]:
        raise ValueError(f"the observation has no {', '.join(missing)}, only {', '.join(observation)}")
    values = [observation[name] for name in parts]
    return torch.cat(values, 1) if isinstance(values[0], torch.Tensor) else np.concatenate(values, 1)
