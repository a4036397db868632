"""Solvers with a number of steps fixed beforehand: the same of every picture, or by the length of its prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from addiff_env.diffusion.backbones import decode_finite, denoise, to_uint8
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.base import Batched
from addiff_env.types import Generated


class FixedSteps(Batched):
    """A solver with N steps, stated as ``ddim-N``: same model, guidance and noise as the environment ``env``.

    ``watch`` sees every evaluation, as `addiff_env.diffusion.backbones.denoise` says.
    """

    def __init__(
        self,
        env: DiffusionDenoiseVectorEnv,
        steps: int,
        solver: str | None = None,
        watch: Any = None,
    ) -> None:
        solver = solver or env.backbone.solver
        super().__init__(env, f"{solver}-{steps}")
        self.steps, self.watch = steps, watch
        self.expected_nfe = float(steps)
        self.schedule = env.backbone.schedule(steps, env.latent_shape, solver)

    def latents(self, prompts: list[str], seeds: Sequence[int], watch: Any = None) -> torch.Tensor:
        """Final latents (B, C, h, w)."""
        noise, scale = self._noise(seeds), self.env.config.guidance_scale
        negative = self.env.config.negative_prompt
        return denoise(self.env.backbone, self.schedule, prompts, noise, scale, watch, negative_prompt=negative)

    def _batch(self, items: list[Item]) -> list[Generated]:
        latents = self.latents([item.prompt for item in items], [item.seed for item in items], self.watch)
        pictures, finite = decode_finite(self.env.backbone, latents)
        passes = self.steps * self.env.passes_per_nfe
        made = zip(items, to_uint8(pictures), finite.tolist(), strict=True)
        return [self._generated(item, picture, passes, finite=is_finite) for item, picture, is_finite in made]


class WordCount(Batched):
    """As many steps as the prompt's length asks for, at a mean of ``mean_steps``: adaptive, but blind.

    ``benchmark`` holds all items of the list, whose mean length sets the scale: a shard, what an interruption left
    over, or a run with a limit gets the steps that it gets in the whole.
    """

    def __init__(self, env: DiffusionDenoiseVectorEnv, mean_steps: float, benchmark: Sequence[Item]) -> None:
        super().__init__(env, f"words-{mean_steps:g}")
        if not benchmark or not mean_steps >= 1:
            raise ValueError(f"{self.name} needs at least one step and one prompt, got {len(benchmark)}")
        self.expected_nfe = mean_steps
        self.mean_steps, self.mean_words = mean_steps, float(np.mean([_words(item) for item in benchmark]))
        self.policy = f"{self.name} at {self.mean_words:.6g} words"

    def make(self, items: list[Item]) -> Iterator[list[tuple[Item, Generated]]]:
        """Make one picture per item."""
        lengths = np.array([_words(item) for item in items])
        steps = np.maximum(1, np.rint(self.mean_steps * lengths / self.mean_words)).astype(int)
        for number in sorted(set(steps.tolist())):
            chosen = [item for item, own in zip(items, steps, strict=True) if own == number]
            yield from FixedSteps(self.env, number).make(chosen)


def _words(item: Item) -> int:
    return max(1, len(item.prompt.split()))
