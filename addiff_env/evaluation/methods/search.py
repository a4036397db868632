"""Methods that choose among pictures by a score: the best of several seeds, the best moment to stop in hindsight."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from addiff_env.diffusion.backbones import Prediction, decode_finite, to_uint8
from addiff_env.diffusion.samplers import ddim_between
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.base import Batched
from addiff_env.evaluation.methods.samplers import FixedSteps
from addiff_env.evaluation.metrics.registry import SCORERS, reward_score
from addiff_env.perception.scorers import load_scorer
from addiff_env.types import Generated

SEED_STRIDE = 1_000_003  # between an item's seeds in best-of-N; the first try has the item's own


class BestOf(Batched):
    """The best of ``number`` seeds by the environment's reward model: the plain way to spend compute on quality.

    It pays for ``number`` whole pictures and as many verdicts of the reward model; no encoder is asked.
    """

    def __init__(self, inner: FixedSteps, number: int) -> None:
        if number < 1:
            raise ValueError(f"the best of {number} pictures is none")
        super().__init__(inner.env, f"best-of-{number}:{inner.name}", max(1, inner.batch_size // number))
        self.inner, self.number, self.solver = inner, number, inner.name
        self.expected_nfe = number * inner.expected_nfe

    def _batch(self, items: list[Item]) -> list[Generated]:
        prompts = [item.prompt for item in items for _ in range(self.number)]
        seeds = [item.seed + SEED_STRIDE * k for item in items for k in range(self.number)]
        size = self.inner.batch_size  # of one picture's tries there may be more
        starts = range(0, len(prompts), size)
        latents = [self.inner.latents(prompts[at : at + size], seeds[at : at + size]) for at in starts]
        pictures, finite = decode_finite(self.env.backbone, torch.cat(latents))
        scores = _among_finite(reward_score(self.env.perception)(pictures, prompts), finite)
        best = scores.view(len(items), self.number).argmax(1).tolist()
        images = to_uint8(pictures)
        passes = self.number * self.inner.steps * self.env.passes_per_nfe
        chosen = [row * self.number + best[row] for row in range(len(items))]
        return [
            self._generated(item, images[place], passes, self.number, self.number, finite[place])
            for item, place in zip(items, chosen, strict=True)
        ]


class OracleStop(Batched):
    """The stopping step that, in hindsight, a scorer likes best; its looks are not charged: it is a bound.

    A stop is what an agent's is: the clean prediction, or ``finish_steps`` coarse steps from there, which are charged.

    Args:
        inner: the solver and its steps.
        scorer: one of the metrics' scorers (``imagereward``, ``hpsv2.1``, ...) or a setting of
            `addiff_env.perception.scorers.load_scorer`; None: the environment's reward model.

    Raises:
        FileNotFoundError, ValueError: as `load_scorer`.
    """

    def __init__(self, inner: FixedSteps, scorer: str | None = None) -> None:
        super().__init__(inner.env, f"oracle-stop:{inner.name}" + (f"@{scorer}" if scorer else ""), inner.batch_size)
        self.inner, self.solver, self.expected_nfe = inner, inner.name, inner.expected_nfe
        self.score = _scorer(inner.env, scorer)

    def _batch(self, items: list[Item]) -> list[Generated]:
        prompts = [item.prompt for item in items]
        finish = self.env.config.finish_steps
        stops: list[tuple[int, np.ndarray, torch.Tensor]] = []  # NFE and pictures of each, and which are finite
        scores: list[torch.Tensor] = []

        def stop(nfe: int, latents: torch.Tensor) -> None:
            pictures, finite = decode_finite(self.env.backbone, latents)
            stops.append((nfe, to_uint8(pictures), finite))
            scores.append(_among_finite(self.score(pictures, prompts), finite))

        def watch(index: int, latents: torch.Tensor, now: Prediction) -> None:
            if not finish:
                stop(index + 1, now.x0)
            elif index:
                stop(index + finish, self._finished(prompts, latents, index))

        last = self.inner.latents(prompts, [item.seed for item in items], watch)
        if finish:
            stop(self.inner.steps, last)
        best = torch.stack(scores, 1).argmax(1).tolist()
        passes = self.env.passes_per_nfe
        return [
            self._generated(item, stops[choice][1][row], stops[choice][0] * passes, finite=stops[choice][2][row])
            for row, (item, choice) in enumerate(zip(items, best, strict=True))
        ]

    def _finished(self, prompts: list[str], latents: torch.Tensor, index: int) -> torch.Tensor:
        """What the environment's *stop* makes of latents (B, C, h, w) at a point of the grid: its coarse DDIM steps."""
        env, schedule, steps = self.env, self.inner.schedule, self.env.config.finish_steps
        at = torch.full((len(latents),), index, device=latents.device)
        conditioning = env.backbone.encode_prompts(prompts, env.config.negative_prompt)
        path = env.denoiser.coarse_path(schedule.timesteps[at], schedule.current.at(at), steps)
        for timesteps, current, next_level in path:
            now = env.backbone.predict(latents, timesteps, current, conditioning, env.config.guidance_scale, False)
            latents = ddim_between(latents, now.x0, current, next_level)
        return latents


def _among_finite(scores: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    """Scores (B,) by which no picture is chosen that is not ``finite`` (B,), unless none is."""
    return torch.where(finite.to(scores.device), scores, -torch.inf)


def _scorer(env: DiffusionDenoiseVectorEnv, setting: str | None) -> Callable[[torch.Tensor, list[str]], torch.Tensor]:
    if setting is None:
        return reward_score(env.perception)
    name, colon, rest = setting.partition(":")
    return load_scorer(SCORERS.get(name, name) + colon + rest, str(env.backbone.device)).score
