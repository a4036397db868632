"""Inference-time search along the denoising path: Feynman-Kac steering, rollover budget forcing, restart sampling.

All start from the noise that every method starts from, draw what further noise they need from the picture's own
generators, look at clean predictions through the environment's preview and reward model as its policies do, and pay
for every look. Each has one ``max_nfe``: evaluations of a picture, all its particles, proposals or restarts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from addiff_env.diffusion.backbones import Conditioning, decode_finite, draw_noise, to_uint8
from addiff_env.diffusion.samplers import ancestral_between, ddim_between, renoise_between
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.base import Batched
from addiff_env.evaluation.methods.search import SEED_STRIDE
from addiff_env.evaluation.metrics.registry import reward_score
from addiff_env.types import Generated

FK_SCALE = 10.0  # lambda of the paper, here in standard deviations of the reward model
FK_LOOKS = 5  # resampling steps of a path, as in the paper
T_MIN, T_MAX = 0.1, 2.0  # restart interval in sigma / alpha, the one that implementations use for Stable Diffusion


class Verifier:
    """The environment's reward model asked about clean predictions, as a policy would be.

    Attributes:
        flops: of one look at one lane, preview included where it reads pictures.
        std: standard deviation of its scores, by its own statement.
    """

    def __init__(self, env: DiffusionDenoiseVectorEnv) -> None:
        self.env, self.perception, self.previewer = env, env.perception, env.observer.previewer
        self.flops, self.std = env.flops_per_call["scorer"], float(self.perception.scorer.std)

    def __call__(
        self, latents: torch.Tensor, prompts: list[str], timesteps: torch.Tensor, left: torch.Tensor
    ) -> torch.Tensor:
        """Scores (B,) float64 of what clean predictions (B, C, h, w) will become; the lowest where not finite.

        Args:
            latents: clean predictions, or final latents.
            prompts: one each.
            timesteps: (B,) that the lanes stand at; 0: they are finished.
            left: (B,) evaluations to come.
        """
        limit = self.perception.score_limit
        if self.perception.reads_latents:
            finite = torch.isfinite(latents).flatten(1).all(1)
            latents, asked = torch.where(finite[:, None, None, None], latents, 0), torch.stack([left, left], 1)
            scores = self.perception.scorer.score_latents(latents, prompts, timesteps, asked)[:, 1].clamp(-limit, limit)
        else:
            pictures, finite = decode_finite(self.previewer, latents)
            scores = reward_score(self.perception)(pictures, prompts)
        return torch.where(finite, scores.double().to(latents.device), -limit)


class Steered(Batched):
    """What methods share that go along a solver's grid, each lane at its own point, with noise of its own.

    Args:
        env: whose model, noise and, where one is asked, reward model are used.
        name: of the method.
        solver: ``ddim``, or ``euler`` of flow models.
        steps: of the grid.
        max_nfe: evaluations of a picture at the most.

    Raises:
        ValueError: a solver without a stochastic step (known: ddim, euler), or no step.
    """

    def __init__(self, env: DiffusionDenoiseVectorEnv, name: str, solver: str, steps: int, max_nfe: int) -> None:
        super().__init__(env, name)
        if solver not in ("ddim", "euler"):
            raise ValueError(f"{name} adds noise between the points of a grid: its solver is ddim or euler")
        if steps < 1:
            raise ValueError(f"{name} has no step")
        self.steps, self.solver, self.max_nfe = steps, f"{solver}-{steps}", max_nfe
        self.expected_nfe = float(max_nfe)
        self.schedule = env.backbone.schedule(steps, env.latent_shape, solver)

    def _encode(self, prompts: list[str]) -> Conditioning:
        return self.env.backbone.encode_prompts(prompts, self.env.config.negative_prompt)

    def _predict(self, latents: torch.Tensor, at: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Clean predictions (B, C, h, w) at the points ``at`` (B,) of the grid, one evaluation of each lane."""
        schedule, scale, found = self.schedule, self.env.config.guidance_scale, []
        for start in range(0, len(latents), self.env.config.batch_size):
            rows = torch.arange(start, min(start + self.env.config.batch_size, len(latents)), device=latents.device)
            own = at[rows]
            now = self.env.backbone.predict(
                latents[rows], schedule.timesteps[own], schedule.current.at(own), conditioning[rows], scale, False
            )
            found.append(now.x0)
        return torch.cat(found)

    def _stochastic_step(
        self, latents: torch.Tensor, x0: torch.Tensor, at: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        return ancestral_between(latents, x0, self.schedule.current.at(at), self.schedule.next.at(at), noise)

    def _fresh(self, generators: Sequence[torch.Generator]) -> torch.Tensor:
        return draw_noise(self.env.backbone, self.env.latent_shape, generators)

    def _verdict(self, verifier: Verifier, x0: torch.Tensor, prompts: list[str], at: torch.Tensor) -> torch.Tensor:
        """Scores (B,) of predictions made at the points ``at`` (B,); those of the last point are finished."""
        last = at == self.steps - 1
        following = self.schedule.timesteps[(at + 1).clamp_max(self.steps - 1)]
        return verifier(x0, prompts, torch.where(last, torch.zeros_like(following), following), self.steps - 1 - at)

    def _results(
        self,
        items: Sequence[Item],
        latents: torch.Tensor,
        nfe: Sequence[int],
        looks: Sequence[int],
        verifier: Verifier | None,
    ) -> list[Generated]:
        """Pictures of final latents (B, C, h, w); each pays for its evaluations, one full decode, and its looks."""
        pictures, finite = decode_finite(self.env.backbone, latents)
        made = [
            self._generated(item, picture, own * self.env.passes_per_nfe, finite=is_finite)
            for item, picture, own, is_finite in zip(items, to_uint8(pictures), nfe, finite.tolist(), strict=True)
        ]
        if verifier is not None:
            for one, number in zip(made, looks, strict=True):
                one.net_flops += number * verifier.flops + self.env.perception.scorer_text_flops()
        return made


# --------------------------------------------------------------------------- Feynman-Kac steering


@dataclass(frozen=True)
class Particles:
    """The particles of several pictures at the end of the path."""

    latents: torch.Tensor  # (items, particles, C, h, w)
    scores: torch.Tensor  # (items, particles) of the reward model
    weights: torch.Tensor  # (items, particles), adding up to 1: what is left of the last potential


class FeynmanKac(Steered):
    """Feynman-Kac steering (Singhal et al. 2025, arXiv 2501.06848) with potentials of reward differences.

    Particles go along a stochastic solver (DDIM with eta 1); at `FK_LOOKS` points of the grid they are weighed by
    exp(scale * (reward - reward at the last look)) and resampled, so that with many of them they follow the model's
    distribution tilted by exp(scale * reward). The picture is the particle with the highest reward.

    Args:
        env, solver, steps: as in `Steered`.
        particles: K; ``max_nfe`` is K times the number of steps.
        scale: lambda, per standard deviation of the reward model.
        looks: points at which rewards are read, the last one among them.

    Raises:
        ValueError: no particle, a scale that is not positive, and as `Steered`.
    """

    def __init__(
        self,
        env: DiffusionDenoiseVectorEnv,
        particles: int,
        solver: str,
        steps: int,
        scale: float = FK_SCALE,
        looks: int = FK_LOOKS,
    ) -> None:
        name = f"fk-{particles}:{solver}-{steps}" + (f"@{scale:g}" if scale != FK_SCALE else "")
        if particles < 1 or not scale > 0 or looks < 1:
            raise ValueError(f"{name} needs a particle, a look and a positive scale")
        super().__init__(env, name, solver, steps, particles * steps)
        self.particles, self.scale, self.verifier = particles, scale, Verifier(env)
        self.looks = sorted({round((k + 1) * steps / looks) - 1 for k in range(looks)} - {-1} | {steps - 1})
        self.batch_size = max(1, self.batch_size // particles)

    def steer(self, items: Sequence[Item]) -> Particles:
        """Go along the path; what the last look weighed is not resampled."""
        number, prompts = len(items), [item.prompt for item in items for _ in range(self.particles)]
        seeds = [item.seed + SEED_STRIDE * k for item in items for k in range(self.particles)]
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        latents, conditioning = self._fresh(generators), self._encode(prompts)
        rewards = torch.zeros(number, self.particles, dtype=torch.float64, device=latents.device)
        weights = torch.full_like(rewards, 1 / self.particles)
        for index in range(self.steps):
            at = torch.full((len(latents),), index, device=latents.device)
            x0 = self._predict(latents, at, conditioning)
            if index in self.looks:
                now = self._verdict(self.verifier, x0, prompts, at).view(number, self.particles)
                weights = torch.softmax(self.scale / self.verifier.std * (now - rewards), 1)
                rewards = now
                if index < self.steps - 1:
                    rows = self._resample(weights, generators)
                    latents, x0, rewards = latents[rows], x0[rows], rewards.flatten()[rows].view_as(rewards)
            latents = self._stochastic_step(latents, x0, at, self._fresh(generators))
        return Particles(latents.view(number, self.particles, *latents.shape[1:]), rewards, weights)

    def _resample(self, weights: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """Rows (items * particles,) that particles go on from, multinomial, by each picture's first generator."""
        rows = []
        for k, own in enumerate(weights.cpu()):
            drawn = torch.multinomial(own, self.particles, True, generator=generators[k * self.particles])
            rows.append(k * self.particles + drawn)
        return torch.cat(rows).to(weights.device)

    def _batch(self, items: list[Item]) -> list[Generated]:
        found = self.steer(items)
        best = found.scores.argmax(1)
        chosen = found.latents[torch.arange(len(items), device=best.device), best]
        number, looks = len(items), self.particles * len(self.looks)
        return self._results(items, chosen, [self.max_nfe] * number, [looks] * number, self.verifier)


# --------------------------------------------------------------------------- rollover budget forcing


@dataclass
class Paths:
    """Where rollover budget forcing stands with each of B pictures."""

    latents: torch.Tensor  # (B, C, h, w) accepted, at the point before ``at``
    x0: torch.Tensor  # (B, C, h, w) the clean prediction there
    score: torch.Tensor  # (B,) of that prediction
    candidate: torch.Tensor  # (B, C, h, w) the best proposal for ``at`` so far
    candidate_x0: torch.Tensor
    candidate_score: torch.Tensor  # -inf: there is none
    at: torch.Tensor  # (B,) the point that proposals are for; the number of steps: finished
    left: torch.Tensor  # (B,) proposals left for that point, those rolled over included
    nfe: torch.Tensor  # (B,) spent


class RolloverBudgetForcing(Steered):
    """Rollover budget forcing (Kim et al. 2025, arXiv 2503.19385) on a stochastic solver.

    Every step has the same quota of proposals. The first proposal whose clean prediction scores higher than the
    present one is taken, and what is left of the quota rolls over to the next step; where none does, the best of them
    is. Pictures of a batch are at their own points of the grid. The first evaluation counts, and all proposals do.

    Raises:
        ValueError: fewer evaluations than steps, and as `Steered`.
    """

    def __init__(self, env: DiffusionDenoiseVectorEnv, max_nfe: int, solver: str, steps: int) -> None:
        name = f"rbf-{max_nfe}:{solver}-{steps}"
        super().__init__(env, name, solver, steps, max_nfe)
        if max_nfe < steps:
            raise ValueError(f"{name}: {steps} steps take {steps} evaluations, max_nfe is {max_nfe}")
        self.verifier = Verifier(env)
        proposals, moves = max_nfe - 1, steps - 1
        # The first steps get what does not divide evenly: nothing of it is lost, as it rolls over.
        self.quotas = [proposals // moves + (k < proposals % moves) for k in range(moves)] if moves else []

    def search(self, items: Sequence[Item]) -> Paths:
        """Go along the path; the final latents are the last clean predictions."""
        prompts = [item.prompt for item in items]
        generators = [torch.Generator().manual_seed(int(item.seed)) for item in items]
        conditioning = self._encode(prompts)
        paths = self._begin(prompts, conditioning, generators)
        while (running := torch.nonzero(paths.at < self.steps).flatten()).numel():
            own, at = [prompts[k] for k in running.tolist()], paths.at[running]
            noise = self._fresh([generators[k] for k in running.tolist()])
            proposed = self._stochastic_step(paths.latents[running], paths.x0[running], at - 1, noise)
            x0 = self._predict(proposed, at, conditioning[running])
            self._propose(paths, running, proposed, x0, self._verdict(self.verifier, x0, own, at))
        return paths

    def _begin(self, prompts: list[str], conditioning: Conditioning, generators: Sequence[torch.Generator]) -> Paths:
        latents = self._fresh(generators)
        start = torch.zeros(len(prompts), dtype=torch.long, device=latents.device)
        x0 = self._predict(latents, start, conditioning)
        score = self._verdict(self.verifier, x0, prompts, start)
        none = torch.full_like(score, -torch.inf)
        left = torch.full_like(start, self.quotas[0] if self.quotas else 0)
        return Paths(latents, x0, score, latents.clone(), x0.clone(), none, start + 1, left, start + 1)

    def _propose(
        self, paths: Paths, lanes: torch.Tensor, latents: torch.Tensor, x0: torch.Tensor, score: torch.Tensor
    ) -> None:
        """Keep the proposals of ``lanes`` that are their best so far; move on where one is taken."""
        chosen = score > paths.candidate_score[lanes]
        better = lanes[chosen]
        paths.candidate[better], paths.candidate_x0[better] = latents[chosen], x0[chosen]
        paths.candidate_score[better] = score[chosen]
        paths.nfe[lanes] += 1
        paths.left[lanes] -= 1
        taken = lanes[(paths.candidate_score[lanes] > paths.score[lanes]) | (paths.left[lanes] == 0)]
        paths.latents[taken], paths.x0[taken] = paths.candidate[taken], paths.candidate_x0[taken]
        paths.score[taken], paths.candidate_score[taken] = paths.candidate_score[taken], -torch.inf
        following = torch.tensor([0, *self.quotas, 0], device=lanes.device)  # by the point that proposals are for
        paths.at[taken] += 1
        paths.left[taken] += following[paths.at[taken]]

    def _batch(self, items: list[Item]) -> list[Generated]:
        paths = self.search(items)
        nfe = paths.nfe.tolist()
        return self._results(items, self._finished(paths), nfe, nfe, self.verifier)

    def _finished(self, paths: Paths) -> torch.Tensor:
        """What the solver makes of the last clean prediction; its last step adds no noise."""
        at = torch.full_like(paths.at, self.steps - 1)
        current, next_level = self.schedule.current.at(at), self.schedule.next.at(at)
        return ddim_between(paths.latents, paths.x0, current, next_level)


# --------------------------------------------------------------------------- restart sampling


class Restart(Steered):
    """Restart sampling (Xu et al. 2023, arXiv 2306.14878): noise goes back up a fixed interval and down again.

    The solver is deterministic; arrived at the last point of the interval, noise is added up to its first point, as
    often as ``max_nfe`` pays for. No verifier is asked.

    Args:
        env, max_nfe, solver, steps: as in `Steered`.
        t_min: end of the interval in sigma / alpha; the nearest points of the grid within it are taken.
        t_max: its beginning.

    Raises:
        ValueError: an interval without two points of the grid, evaluations that pay for no restart, and as `Steered`.
    """

    def __init__(
        self,
        env: DiffusionDenoiseVectorEnv,
        max_nfe: int,
        solver: str,
        steps: int,
        t_min: float = T_MIN,
        t_max: float = T_MAX,
    ) -> None:
        name = f"restart-{max_nfe}:{solver}-{steps}" + (
            f"@{t_min:g}:{t_max:g}" if (t_min, t_max) != (T_MIN, T_MAX) else ""
        )
        super().__init__(env, name, solver, steps, max_nfe)
        ratio = (self.schedule.current.sigma / self.schedule.current.alpha).tolist()
        within = [k for k, t in enumerate(ratio) if t_min <= t <= t_max]
        if len(within) < 2:
            raise ValueError(f"{name}: of the grid's levels {[f'{t:.3g}' for t in ratio]} two must lie in the interval")
        self.first, self.last = within[0], within[-1]
        self.restarts = (max_nfe - steps) // (self.last - self.first)
        if self.restarts < 1:
            least = steps + self.last - self.first
            raise ValueError(f"{name}: a restart takes {self.last - self.first} evaluations, so max_nfe >= {least}")
        self.nfe = steps + self.restarts * (self.last - self.first)
        self.expected_nfe = float(self.nfe)

    def latents(self, items: Sequence[Item]) -> torch.Tensor:
        """Final latents (B, C, h, w)."""
        generators = [torch.Generator().manual_seed(int(item.seed)) for item in items]
        latents, conditioning = self._fresh(generators), self._encode([item.prompt for item in items])
        again = range(self.first, self.last)
        latents = self._down(latents, range(self.last), conditioning)
        for _ in range(self.restarts):
            low, high = (self.schedule.current.at([k] * len(items)) for k in (self.last, self.first))
            latents = renoise_between(latents, low, high, self._fresh(generators))
            latents = self._down(latents, again, conditioning)
        return self._down(latents, range(self.last, self.steps), conditioning)

    def _down(self, latents: torch.Tensor, points: range, conditioning: Conditioning) -> torch.Tensor:
        for index in points:
            at = torch.full((len(latents),), index, device=latents.device)
            x0 = self._predict(latents, at, conditioning)
            latents = ddim_between(latents, x0, self.schedule.current.at(at), self.schedule.next.at(at))
        return latents

    def _batch(self, items: list[Item]) -> list[Generated]:
        return self._results(items, self.latents(items), [self.nfe] * len(items), [], None)
