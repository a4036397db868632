"""Denoising many lanes at once, each at its own point of the schedule: state, solver steps, costs.

No policy, reward or Gymnasium here: `addiff_env.env.refine` adds RegionRefine, `addiff_env.env.vector` the environment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from addiff_env.diffusion.backbones import Backbone, Conditioning, draw_noise, load_backbone
from addiff_env.diffusion.samplers import Level, Schedule, ddim_between, solver_step
from addiff_env.env.config import EnvConfig


class Lanes:
    """The state of ``num_envs`` lanes and what moves them along the schedule.

    Device tensors hold a lane per row: ``latents`` and ``x0`` (B, C, h, w) in the network's dtype, ``maps``
    (B, tokens, h', w') and ``unet_features`` (B, channels) float32 of the latest evaluation. NumPy arrays (B,) count:
    ``step_index``, ``nfe``, ``net_flops``, ``done``. A lane's noise comes from its own generator only.
    """

    config: EnvConfig
    num_envs: int
    backbone: Backbone
    schedule: Schedule
    latent_shape: tuple[int, int, int]
    price: dict[str, float]  # FLOPs per lane of: denoiser (one pass), decode, text (one prompt), start
    _tensors: tuple[str, ...] = ("latents", "x0", "has_previous", "faults", "maps", "unet_features")
    _arrays: tuple[str, ...] = ("seed", "step_index", "nfe", "net_flops", "done")

    def _set_up(self) -> None:
        """Load the model and make the schedule."""
        c = self.config
        self.backbone = load_backbone(**c.backbone_settings)
        self.backbone.check_negative_prompt(c.negative_prompt, c.guidance_scale)
        self.latent_shape = self.backbone.latent_shape(c.height, c.width)
        self.schedule = self.backbone.schedule(c.num_inference_steps, self.latent_shape, c.solver, c.eta)
        self._grid = self.schedule.timesteps.cpu().numpy()
        self._trained = self.schedule.training_timesteps.cpu().numpy()
        self.passes_per_nfe = self.backbone.passes(c.guidance_scale)
        self.price = {name: self.backbone.flops(name, self.latent_shape) for name in ("denoiser", "decode", "text")}
        self.price["start"] = self.backbone.texts_encoded(c.guidance_scale, c.negative_prompt) * self.price["text"]

    def _make_lanes(self) -> None:
        n, device, stride = self.num_envs, self.backbone.device, self.backbone.attention_stride
        self.negative_prompt: list[str | None] = [self.config.negative_prompt] * n
        self.conditioning: Conditioning = self.backbone.encode_prompts([""] * n, self.negative_prompt)
        side = [-(-cells // stride) for cells in self.latent_shape[1:]]
        self.latents = torch.zeros(n, *self.latent_shape, device=device, dtype=self.backbone.dtype)
        self.x0 = torch.zeros_like(self.latents)
        self.has_previous = torch.zeros(n, dtype=torch.bool, device=device)  # multistep solvers' history
        self.faults = torch.zeros(n, dtype=torch.bool, device=device)  # lanes whose numbers stopped being finite
        self.maps = torch.zeros(n, self.conditioning.content.shape[1], *side, device=device)
        self.unet_features = torch.zeros(n, self.backbone.feature_width, device=device)
        self.generators = [torch.Generator() for _ in range(n)]
        self.prompt, self.seed = [""] * n, np.zeros(n, np.int64)
        self.step_index, self.nfe = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.net_flops = np.zeros(n)
        self.done = np.ones(n, bool)  # no lane runs before its first start

    def _start_lanes(
        self,
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
        index = self._index(lanes)
        for row, lane in enumerate(lanes):
            self.prompt[lane], self.seed[lane], self.negative_prompt[lane] = prompts[row], seeds[row], negatives[row]
            self.generators[lane].manual_seed(int(seeds[row]))
        self.latents[index] = self._fresh_noise(lanes) if latents is None else latents
        self.conditioning.put(index, self.backbone.encode_prompts(prompts, negatives))
        self.x0[index], self.maps[index], self.unet_features[index] = 0, 0, 0
        self._forget(lanes)
        self.faults[index] = False
        self.step_index[lanes], self.nfe[lanes] = 0, 0
        self.net_flops[lanes] = [self.price["start"] + self._extra_text_flops(text) for text in negatives]
        self.done[lanes] = False

    def _extra_text_flops(self, negative_prompt: str | None) -> float:
        """What a lane's own negative prompt costs beyond what the setting's does."""
        c = self.config
        texts = [self.backbone.texts_encoded(c.guidance_scale, text) for text in (negative_prompt, c.negative_prompt)]
        return (texts[0] - texts[1]) * self.price["text"]

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the lanes go on: copies on the CPU, tensors, numbers and strings only.

        `load_state_dict` of an environment with the same settings then continues exactly as this one would. What can be
        computed again (encoded prompts) is left out.
        """
        state: dict[str, Any] = {name: getattr(self, name).detach().cpu().clone() for name in self._tensors}
        state |= {name: torch.from_numpy(getattr(self, name).copy()) for name in self._arrays}
        generators = [generator.get_state() for generator in self.generators]
        texts = {"prompt": [str(prompt) for prompt in self.prompt], "negative_prompt": list(self.negative_prompt)}
        return state | texts | {"generators": generators}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the lanes where `state_dict` found them.

        Raises:
            ValueError: the state is that of other settings (number of lanes, size, model); the message shows both.
        """
        for name in (*self._tensors, *self._arrays):
            wanted, got = tuple(getattr(self, name).shape), tuple(state[name].shape)
            if wanted != got:
                raise ValueError(f"the state is that of another environment: {name} is {got} there, {wanted} here")
        for name in self._tensors:
            getattr(self, name).copy_(state[name])
        for name in self._arrays:
            getattr(self, name)[:] = state[name].numpy()
        for generator, saved in zip(self.generators, state["generators"], strict=True):
            generator.set_state(saved)
        self.prompt = list(state["prompt"])
        # Earlier releases had none.
        self.negative_prompt = list(state.get("negative_prompt", [self.config.negative_prompt] * self.num_envs))
        encoded = self.backbone.encode_prompts(self.prompt, self.negative_prompt)
        self.conditioning.put(self._index(np.arange(self.num_envs)), encoded)

    def _index(self, lanes: np.ndarray) -> torch.Tensor:
        """Host numbers on the device, without waiting for it."""
        return torch.as_tensor(lanes).to(self.backbone.device, non_blocking=True)

    def _fresh_noise(self, lanes: np.ndarray) -> torch.Tensor:
        """Noise (L, C, h, w), each lane's from its own generator."""
        return draw_noise(self.backbone, self.latent_shape, [self.generators[lane] for lane in lanes])

    def _forget(self, lanes: np.ndarray) -> None:
        """Clear the solver history of ``lanes``, and of no others."""
        self.has_previous[self._index(lanes)] = False

    def _chunks(self, number: int) -> Iterator[slice]:
        """Slices of at most ``batch_size`` rows, which bounds the memory of one call."""
        size = self.config.batch_size
        return (slice(start, start + size) for start in range(0, number, size))

    # ----------------------------------------------------------------- denoising

    def _evaluate(self, lanes: np.ndarray, timesteps: torch.Tensor, level: Level, capture: bool = True) -> None:
        """One denoiser evaluation of ``lanes`` at their ``timesteps`` and levels; sets x0, maps and features.

        ``capture``: somebody will look at this evaluation's attention. Of several in one action it is the last's only.
        A lane whose prediction is not finite is marked in ``faults`` and keeps its x0 of before, so that everything
        downstream stays finite; the others do not notice.
        """
        for rows in self._chunks(len(lanes)):
            part = self._index(lanes[rows])
            now = self.backbone.predict(
                self.latents[part],
                timesteps[rows],
                level.at(rows),
                self.conditioning[part],
                self.config.guidance_scale,
                capture,
            )
            good = torch.isfinite(now.x0).flatten(1).all(1)
            self.faults[part] |= ~good
            self.x0[part] = _where(good, now.x0, self.x0[part])
            self.unet_features[part] = _where(good, now.features, self.unet_features[part])
            if capture:
                self.maps[part] = _where(good, now.maps, self.maps[part])
        self.nfe[lanes] += 1
        self.net_flops[lanes] += self.passes_per_nfe * self.price["denoiser"]

    def _continue(self, lanes: np.ndarray, capture: bool = True) -> None:
        """One solver step of ``lanes`` along the grid; a lane that reaches its end is finished."""
        if len(lanes) == 0:
            return
        index, at = self._index(lanes), self._index(self.step_index[lanes])
        before = self.x0[index].clone() if self.schedule.multistep else None
        self._evaluate(lanes, self.schedule.timesteps[at], self.schedule.here.at(at), capture)
        noise = self._fresh_noise(lanes) if self.schedule.needs_noise else None
        latents, known = self.latents[index], self.has_previous[index]
        self.latents[index] = solver_step(self.schedule, latents, self.x0[index], at, before, known, noise)
        self.has_previous[index] = True
        self.step_index[lanes] += 1
        self.done[lanes[self.step_index[lanes] == self.schedule.num_inference_steps]] = True

    def _finish(self, lanes: np.ndarray) -> None:
        """End ``lanes`` where they are: x0 becomes the result, or that of ``finish_steps`` coarse steps."""
        if len(lanes) == 0:
            return
        index, steps = self._index(lanes), self.config.finish_steps
        if steps == 0:
            self.latents[index] = self.x0[index]
        else:
            at = self._index(self.step_index[lanes])
            self._coarse_steps(lanes, self.schedule.timesteps[at], self.schedule.here.at(at), steps)
        self.done[lanes] = True

    def _coarse_steps(self, lanes: np.ndarray, timesteps: torch.Tensor, level: Level, steps: int) -> None:
        """``steps`` DDIM steps of equal length in training time from ``timesteps`` (L,) and ``level`` to the end."""
        here, told = level, timesteps
        for j in range(steps):
            there, next_told = self._towards_zero(timesteps, (steps - j - 1) / steps)
            self._coarse_step(lanes, told, here, there, capture=j + 1 == steps)
            here, told = there, next_told

    def _coarse_step(
        self, lanes: np.ndarray, timesteps: torch.Tensor, here: Level, there: Level, capture: bool
    ) -> None:
        """Evaluate at ``here`` and go to ``there`` by DDIM with eta 0."""
        index = self._index(lanes)
        self._evaluate(lanes, timesteps, here, capture)
        self.latents[index] = ddim_between(self.latents[index], self.x0[index], here, there)

    def _towards_zero(self, timesteps: torch.Tensor, share: float) -> tuple[Level, torch.Tensor]:
        """The level at ``share`` of the way up to ``timesteps`` (L,), and what the network is told there."""
        if share == 0:
            ones = torch.ones(len(timesteps), device=timesteps.device, dtype=torch.float64)
            return Level(ones, torch.zeros_like(ones)), torch.zeros_like(timesteps)
        trained = self._trained_at((timesteps * share).round())
        return self.schedule.training.at(trained), self.schedule.training_timesteps[trained]

    def _trained_at(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Index into the training levels of what the network is told, (L,) int64."""
        table = self.schedule.training_timesteps.double()
        return torch.searchsorted(table, timesteps.double()).clamp(0, len(table) - 1)


def _where(rows: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """``new`` in the chosen ``rows`` (B,) bool, ``old`` elsewhere."""
    return torch.where(rows.view(-1, *[1] * (new.ndim - 1)), new.to(old.dtype), old)
