"""Trained agents as safe bundles: a folder with ``agent.safetensors`` and ``agent.json``; no pickle."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from addiff_env.types import Action

FORMAT_VERSION = 1
PART_NORM = 2.0  # root-mean-square length of every normalised part
WEIGHTS, CONFIG = "agent.safetensors", "agent.json"


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

    def set_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Fix the statistics (width,) of the observations; a slot that never varies is left out (scale 0)."""
        varies = std > 1e-6
        self.mean.copy_(mean)
        scale = PART_NORM / (std.clamp_min(1e-6) * self.root_widths)
        self.scale.copy_(torch.where(varies, scale, torch.zeros_like(std)))

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Observations (B, width) to normalised ones, clipped to 10 standard deviations."""
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


class Agent:
    """A trained policy with everything needed to run it again.

    ``config`` holds ``env`` (``id`` and ``kwargs``), ``observation`` (part widths, in order), ``hidden``,
    ``reward`` and a ``training`` summary.
    """

    def __init__(self, policy: PolicyNet, config: dict[str, Any]) -> None:
        self.policy, self.config = policy.eval(), config

    @property
    def flops(self) -> float:
        """Floating-point operations of one decision."""
        return float(sum(2 * m.in_features * m.out_features for m in self.policy.modules() if isinstance(m, nn.Linear)))

    @property
    def fingerprint(self) -> str:
        """The first 12 hex digits of the SHA-256 of the weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self.policy.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.cpu().numpy().tobytes())
        return digest.hexdigest()[:12]

    @torch.no_grad()
    def act(
        self,
        obs: np.ndarray | torch.Tensor,
        action_mask: np.ndarray | None = None,
        deterministic: bool = True,
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """Choose actions (B,) int64 for observations (B, width); ``action_mask`` (B, 3) bool rules some out.

        Raises:
            ValueError: observations of another width; not deterministic and no ``rng``.
        """
        logits = self.logits(obs)
        if action_mask is not None:
            logits = np.where(action_mask, logits, -np.inf)
        if deterministic:
            return logits.argmax(1)
        if rng is None:
            raise ValueError("sampling actions needs rng=numpy.random.default_rng(seed)")
        return (logits + rng.gumbel(size=logits.shape)).argmax(1)

    @torch.no_grad()
    def logits(self, obs: np.ndarray | torch.Tensor) -> np.ndarray:
        """Unnormalised log-probabilities (B, 3) of the actions."""
        observations = torch.as_tensor(obs, dtype=torch.float32)
        width = sum(self.policy.norm.parts.values())
        if observations.ndim != 2 or observations.shape[1] != width:
            layout = self.config["observation"]
            raise ValueError(f"this agent sees {width} numbers ({layout}), got {tuple(observations.shape)}")
        return self.policy(observations.to(self.policy.head.weight.device)).cpu().numpy()

    def save(self, folder: str | Path) -> None:
        """Write the bundle; an interrupted save leaves the old files or the new ones."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.contiguous() for name, value in self.policy.state_dict().items()}
        save_file(weights, folder / (WEIGHTS + ".partial"))
        text = json.dumps({"format_version": FORMAT_VERSION, **self.config}, indent=2)
        (folder / (CONFIG + ".partial")).write_text(text + "\n")
        for name in (WEIGHTS, CONFIG):
            os.replace(folder / (name + ".partial"), folder / name)

    @classmethod
    def load(cls, folder: str | Path) -> Agent:
        """Read a bundle.

        Raises:
            FileNotFoundError: a file is missing; ValueError: unknown format version, damaged weights, or
            weights that do not fit the description.
        """
        folder = Path(folder)
        for name in (WEIGHTS, CONFIG):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no {name} in {str(folder)!r}; train an agent with: make train")
        config = _read_config(folder / CONFIG)
        policy = PolicyNet(config["observation"], config["hidden"])
        try:
            policy.load_state_dict(load_file(folder / WEIGHTS))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{folder / WEIGHTS} is damaged or does not fit its agent.json: {error}") from error
        return cls(policy, config)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold one JSON object, got {str(config)[:80]!r}")
    version = config.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version!r}, this release reads {FORMAT_VERSION}")
    if missing := {"observation", "hidden"} - set(config):
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")
    return config
