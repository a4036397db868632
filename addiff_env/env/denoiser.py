"""The frozen model on its schedule: what moves lanes, each at its own point of the grid, and what that costs.

No policy, reward or Gymnasium here: `addiff_env.env.refine` adds RegionRefine, `addiff_env.env.vector` the environment.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from addiff_env.diffusion.backbones import Backbone, draw_noise, load_backbone
from addiff_env.diffusion.samplers import Level, ddim_between, solver_step
from addiff_env.env.config import EnvConfig, renoise_timestep
from addiff_env.env.state import LaneState


@dataclass(frozen=True)
class Evaluation:
    """One denoiser evaluation that an action asks for; see `Denoiser.evaluate`."""

    lanes: np.ndarray  # (L,)
    timesteps: torch.Tensor  # (L,)
    level: Level
    capture: bool

    @classmethod
    def together(cls, parts: Sequence[Evaluation]) -> Evaluation:
        """Those of different lanes as one."""
        level = Level(*(torch.cat(values) for values in zip(*(part.level for part in parts), strict=True)))
        lanes = np.concatenate([part.lanes for part in parts])
        return cls(lanes, torch.cat([part.timesteps for part in parts]), level, any(part.capture for part in parts))


# What an action does: goes on when an evaluation that it asked for was made, returns the lanes that it leaves running
Work = Generator[Evaluation, None, np.ndarray]


class Denoiser:
    """Evaluations and solver steps of the ``lanes`` (L,) of a `LaneState`; the model is frozen, the state is written.

    Attributes:
        backbone: the text-to-image model.
        schedule: the grid that the lanes go along, and the levels that the model was trained at.
        joint: whether evaluations of several actions share a batch, see `carry_out`.
        latent_shape: (C, h, w).
        renoise_indices: (N,) for each point of the grid, index into the training levels of a refinement's t'.
        passes_per_nfe: network passes of one evaluation (2 with guidance).
        flops_per_call: FLOPs per lane of ``denoiser`` (one pass), ``decode``, ``text`` (one prompt) and ``start`` (the
            texts of one lane).
    """

    def __init__(self, config: EnvConfig, backbone: Backbone) -> None:
        self.config, self.backbone, self.joint = config, backbone, False
        backbone.check_negative_prompt(config.negative_prompt, config.guidance_scale)
        self.latent_shape = backbone.latent_shape(config.height, config.width)
        self.schedule = backbone.schedule(config.num_inference_steps, self.latent_shape, config.solver, config.eta)
        self.timesteps = self.schedule.timesteps.cpu().numpy()  # (N,), as the schedule's, on the host
        self.training_timesteps = self.schedule.training_timesteps.cpu().numpy()  # (T,)
        total, grid = len(self.training_timesteps), [round(float(t)) for t in self.timesteps]
        self.renoise_indices = np.array([renoise_timestep(config.renoise, current, total) for current in grid])
        self.passes_per_nfe = backbone.passes(config.guidance_scale)
        flops = {name: backbone.flops(name, self.latent_shape) for name in ("denoiser", "decode", "text")}
        texts = backbone.texts_encoded(config.guidance_scale, config.negative_prompt)
        self.flops_per_call = flops | {"start": texts * flops["text"]}

    @classmethod
    def load(cls, config: EnvConfig) -> Denoiser:
        """With the model that ``config`` names; raises as `load_backbone`, and ValueError for what does not fit it."""
        return cls(config, load_backbone(**config.backbone_settings))

    def chunks(self, number: int) -> Iterator[slice]:
        """Slices of at most ``batch_size`` rows, which bounds the memory of one call."""
        size = self.config.batch_size
        return (slice(start, start + size) for start in range(0, number, size))

    # ----------------------------------------------------------------- start

    def start(
        self,
        state: LaneState,
        lanes: np.ndarray,
        prompts: Sequence[str],
        seeds: Sequence[int],
        latents: torch.Tensor | None = None,
        negative_prompts: Sequence[str | None] | None = None,
    ) -> None:
        """Put ``lanes`` at the beginning of the schedule; without ``latents`` their noise is drawn from the seeds.

        Where ``negative_prompts`` are not given, or None, they are the setting's.
        """
        setting = self.config.negative_prompt
        negatives = [setting if text is None else text for text in negative_prompts or [None] * len(lanes)]
        for row, lane in enumerate(lanes):
            state.prompt[lane], state.seed[lane], state.negative_prompt[lane] = prompts[row], seeds[row], negatives[row]
            state.pictures[lane] = None
            state.generators[lane].manual_seed(int(seeds[row]))
        index = state.index(lanes)
        state.latents[index] = self.fresh_noise(state, lanes) if latents is None else latents
        self.encode(state, lanes)
        for values in (state.x0, state.maps, state.unet_features, state.refine_masks):
            values[index] = 0
        state.has_previous[index], state.nonfinite[index] = False, False
        for counts in (state.step_index, state.nfe, state.refines, state.decisions):
            counts[lanes] = 0
        state.net_flops[lanes] = [self.flops_per_call["start"] + self._extra_text_flops(text) for text in negatives]
        state.done[lanes], state.fault[lanes] = False, False

    def encode(self, state: LaneState, lanes: np.ndarray) -> None:
        """Encode the prompts of ``lanes``."""
        prompts, negatives = ([texts[lane] for lane in lanes] for texts in (state.prompt, state.negative_prompt))
        state.conditioning.put(state.index(lanes), self.backbone.encode_prompts(prompts, negatives))

    def _extra_text_flops(self, negative_prompt: str | None) -> float:
        """What a lane's own negative prompt costs beyond what the setting's does."""
        c = self.config
        texts = [self.backbone.texts_encoded(c.guidance_scale, text) for text in (negative_prompt, c.negative_prompt)]
        return (texts[0] - texts[1]) * self.flops_per_call["text"]

    def fresh_noise(self, state: LaneState, lanes: np.ndarray) -> torch.Tensor:
        """Noise (L, C, h, w), each lane's from its own generator."""
        return draw_noise(self.backbone, self.latent_shape, [state.generators[lane] for lane in lanes])

    # ----------------------------------------------------------------- denoising

    def carry_out(self, state: LaneState, *works: Work) -> None:
        """Do the ``works``, which are about different lanes: one after another; or, with ``joint``, side by side.

        Side by side the evaluations that they ask for at a time are made in one batch.
        """
        for group in [works] if self.joint else [[work] for work in works]:
            asked = ask(group)
            while asked:
                asked = self.advance(state, asked)

    def advance(self, state: LaneState, asked: Mapping[Work, Evaluation]) -> dict[Work, Evaluation]:
        """Make the evaluations that works ``asked`` for, in one batch; returns what those that go on ask for next."""
        if not asked:
            return {}
        one = Evaluation.together(list(asked.values())) if len(asked) > 1 else next(iter(asked.values()))
        self.evaluate(state, one.lanes, one.timesteps, one.level, one.capture)
        return ask(asked)

    def evaluate(
        self, state: LaneState, lanes: np.ndarray, timesteps: torch.Tensor, level: Level, capture: bool = True
    ) -> None:
        """One denoiser evaluation of ``lanes`` at their ``timesteps`` (L,) and ``level``; sets x0, maps and features.

        ``capture``: this evaluation's attention is read afterwards. Of several in one action it is the last's only.
        A lane whose prediction is not finite is marked in ``nonfinite`` and keeps its x0 of before, so that everything
        downstream stays finite; the others do not notice.
        """
        for rows in self.chunks(len(lanes)):
            part = state.index(lanes[rows])
            now = self.backbone.predict(
                state.latents[part],
                timesteps[rows],
                level.at(rows),
                state.conditioning[part],
                self.config.guidance_scale,
                capture,
            )
            good = torch.isfinite(now.x0).flatten(1).all(1)
            state.nonfinite[part] |= ~good
            state.x0[part] = _where(good, now.x0, state.x0[part])
            state.unet_features[part] = _where(good, now.features, state.unet_features[part])
            if capture:
                state.maps[part] = _where(good, now.maps, state.maps[part])
        state.nfe[lanes] += 1
        state.net_flops[lanes] += self.passes_per_nfe * self.flops_per_call["denoiser"]

    def step(self, state: LaneState, lanes: np.ndarray, capture: bool = True) -> None:
        """One solver step of ``lanes`` along the grid; a lane that reaches its end is done."""
        self.carry_out(state, self.stepping(state, lanes, capture))

    def stepping(self, state: LaneState, lanes: np.ndarray, capture: bool = True) -> Work:
        """What `step` does."""
        if len(lanes) == 0:
            return lanes
        index, at = state.index(lanes), state.index(state.step_index[lanes])
        before = state.x0[index].clone() if self.schedule.multistep else None
        yield Evaluation(lanes, self.schedule.timesteps[at], self.schedule.current.at(at), capture)
        noise = self.fresh_noise(state, lanes) if self.schedule.needs_noise else None
        latents, known = state.latents[index], state.has_previous[index]
        state.latents[index] = solver_step(self.schedule, latents, state.x0[index], at, before, known, noise)
        state.has_previous[index] = True
        state.step_index[lanes] += 1
        state.done[lanes[state.step_index[lanes] == self.schedule.num_inference_steps]] = True
        return lanes[~state.done[lanes]]

    def finish(self, state: LaneState, lanes: np.ndarray, steps: int | None = None) -> None:
        """End ``lanes`` where they are: x0 is the result, or that of ``steps`` coarse steps (None: the setting)."""
        self.carry_out(state, self.finishing(state, lanes, steps))

    def finishing(self, state: LaneState, lanes: np.ndarray, steps: int | None = None) -> Work:
        """What `finish` does."""
        if len(lanes) == 0:
            return lanes
        index, steps = state.index(lanes), self.config.finish_steps if steps is None else steps
        if steps == 0:
            state.latents[index] = state.x0[index]
        else:
            at = state.index(state.step_index[lanes])
            path = self.coarse_path(self.schedule.timesteps[at], self.schedule.current.at(at), steps)
            for j, (timesteps, current, next_level) in enumerate(path):
                yield from self.coarse_step(state, lanes, timesteps, current, next_level, capture=j + 1 == steps)
        state.done[lanes] = True
        return lanes[:0]

    def settle_nonfinite(self, state: LaneState, lanes: np.ndarray) -> None:
        """Mark those of ``lanes`` whose numbers stopped being finite; what they show is their last finite x0."""
        faulty = lanes[state.nonfinite[state.index(lanes)].cpu().numpy()]
        if len(faulty) == 0:
            return
        index = state.index(faulty)
        state.latents[index] = state.x0[index]
        state.fault[faulty] = True

    def coarse_step(
        self,
        state: LaneState,
        lanes: np.ndarray,
        timesteps: torch.Tensor,
        current: Level,
        next_level: Level,
        capture: bool,
    ) -> Iterator[Evaluation]:
        """Evaluate at the ``current`` level and go to the ``next_level`` by DDIM with eta 0."""
        index = state.index(lanes)
        yield Evaluation(lanes, timesteps, current, capture)
        state.latents[index] = ddim_between(state.latents[index], state.x0[index], current, next_level)

    def coarse_path(
        self, timesteps: torch.Tensor, level: Level, steps: int
    ) -> Iterator[tuple[torch.Tensor, Level, Level]]:
        """``steps`` steps of equal length in training time from ``timesteps`` (L,) and ``level`` to the end.

        Yields, for each, the timesteps and the levels before and after it.
        """
        now, current = timesteps, level
        for j in range(steps):
            next_timesteps, next_level = self._level_at_fraction(timesteps, (steps - j - 1) / steps)
            yield now, current, next_level
            now, current = next_timesteps, next_level

    def _level_at_fraction(self, timesteps: torch.Tensor, fraction: float) -> tuple[torch.Tensor, Level]:
        """The timesteps at ``fraction`` of the way from the clean end up to ``timesteps`` (L,), and their level."""
        if fraction == 0:
            ones = torch.ones(len(timesteps), device=timesteps.device, dtype=torch.float64)
            return torch.zeros_like(timesteps), Level(ones, torch.zeros_like(ones))
        table = self.schedule.training_timesteps.double()
        nearest = torch.searchsorted(table, (timesteps * fraction).round().double()).clamp(0, len(table) - 1)
        return self.schedule.training_timesteps[nearest], self.schedule.training.at(nearest)


def ask(works: Iterable[Work]) -> dict[Work, Evaluation]:
    """Let each go on until it asks for an evaluation; those that have ended ask for none."""
    asked = {work: next(work, None) for work in works}
    return {work: evaluation for work, evaluation in asked.items() if evaluation is not None}


def reset_solver_history(state: LaneState, lanes: np.ndarray) -> None:
    """Let a multistep solver begin anew in ``lanes``, and in no others."""
    state.has_previous[state.index(lanes)] = False


def _where(rows: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """``new`` in the chosen ``rows`` (B,) bool, ``old`` elsewhere."""
    return torch.where(rows.view(-1, *[1] * (new.ndim - 1)), new.to(old.dtype), old)
