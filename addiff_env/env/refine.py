"""RegionRefine: re-denoise the regions that came out badly, and leave the rest as it is."""

from __future__ import annotations

import numpy as np
import torch

from addiff_env.diffusion.attention import refinement_mask
from addiff_env.diffusion.samplers import Level, add_noise
from addiff_env.env.config import renoise_timestep
from addiff_env.env.dynamics import Lanes


class RefinableLanes(Lanes):
    """Lanes that can go back in time inside a mask (``refine_masks``, (B, 1, h, w) in [0, 1], 1 = renew)."""

    _tensors = (*Lanes._tensors, "refine_masks")
    _arrays = (*Lanes._arrays, "refines")

    def _make_lanes(self) -> None:
        super()._make_lanes()
        self.refine_masks = torch.zeros(self.num_envs, 1, *self.latent_shape[1:], device=self.backbone.device)
        self.refines = np.zeros(self.num_envs, np.int64)

    def _refine(self, lanes: np.ndarray) -> None:
        """Refine ``lanes`` once, as ``refine_mode`` says: ``refine_k`` evaluations each.

        The lane's whole x0 is noised to the level t'; before each evaluation the outside of the mask is
        held to its own x0 noised to that evaluation's level, so that the denoiser never sees a half-clean latent.
        """
        if len(lanes) == 0:
            return
        self.refine_masks[self._index(lanes)] = self._make_masks(lanes)
        self.refines[lanes] += 1
        self._forget(lanes)
        if self.config.refine_mode == "rewind":
            self._rewind(lanes)
        else:
            self._refine_in_place(lanes)
        self._forget(lanes)

    def _make_masks(self, lanes: np.ndarray) -> torch.Tensor:
        """Refinement masks (L, 1, h, w) of ``lanes`` from the latest evaluation's attention."""
        c, index, noise = self.config, self._index(lanes), None
        if c.mask == "random":
            side = self.maps.shape[-2:]
            drawn = torch.stack([torch.randn(1, *side, generator=self.generators[lane]) for lane in lanes])
            noise = drawn.to(self.backbone.device, non_blocking=True)
        return refinement_mask(
            c.mask,
            self.maps[index],
            self.conditioning.content[index],
            (self.latent_shape[1], self.latent_shape[2]),
            c.mask_threshold,
            c.blur_sigma,
            noise,
        )

    def _renoise_index(self, lanes: np.ndarray) -> np.ndarray:
        """Index (L,) into the training levels of t', where ``lanes`` go back to."""
        current = self._grid[np.minimum(self.step_index[lanes], len(self._grid) - 1)]
        total = len(self._trained)
        return np.array([renoise_timestep(self.config.renoise, round(float(t)), total) for t in current])

    def _rewind(self, lanes: np.ndarray) -> None:
        """Go back to the grid point nearest t' and step on from there, for k ordinary solver steps."""
        index = self._index(lanes)
        target = self._trained[self._renoise_index(lanes)]
        nearest = np.abs(self._grid[None] - target[:, None]).argmin(1)
        nearest = np.minimum(nearest, self.step_index[lanes])  # a refinement never skips steps
        self.step_index[lanes] = nearest
        old, noise = self.x0[index].clone(), self._fresh_noise(lanes)
        self.latents[index] = add_noise(old, noise, self.schedule.here.at(self._index(nearest)))
        running = np.ones(len(lanes), bool)
        for j in range(self.config.refine_k):
            going = lanes[running]
            ends = self.step_index[going] + 1 == self.schedule.num_inference_steps
            self._continue(going, capture=bool(j + 1 == self.config.refine_k or ends.any()))
            # Before the next evaluation the outside is brought to that evaluation's own noise level.
            rows = self._index(np.flatnonzero(running))
            self._hold_outside(lanes[running], old[rows], noise[rows])
            running &= ~self.done[lanes]

    def _hold_outside(self, lanes: np.ndarray, old: torch.Tensor, noise: torch.Tensor) -> None:
        """Set latents and x0 outside the mask to ``old`` x0, the latents noised to the lane's present level."""
        level = self.schedule.there.at(self._index(self.step_index[lanes] - 1))
        self._blend(lanes, old, noise, level)
        index = self._index(lanes)
        mask = self.refine_masks[index].to(self.latents.dtype)
        self.x0[index] = mask * self.x0[index] + (1 - mask) * old

    def _blend(self, lanes: np.ndarray, old: torch.Tensor, noise: torch.Tensor, level: Level) -> None:
        index = self._index(lanes)
        mask = self.refine_masks[index].to(self.latents.dtype)
        self.latents[index] = mask * self.latents[index] + (1 - mask) * add_noise(old, noise, level)

    def _refine_in_place(self, lanes: np.ndarray) -> None:
        """Renew x0 inside the mask from t' down in k coarse steps, then noise it back to where the lane stands."""
        index, steps = self._index(lanes), self.config.refine_k
        old, noise = self.x0[index].clone(), self._fresh_noise(lanes)
        trained = self._index(self._renoise_index(lanes))
        told, here = self.schedule.training_timesteps[trained], self.schedule.training.at(trained)
        start = told
        self.latents[index] = add_noise(old, noise, here)
        for j in range(steps):
            there, next_told = self._towards_zero(start, (steps - j - 1) / steps)
            self._coarse_step(lanes, told, here, there, capture=j + 1 == steps)
            if j + 1 < steps:
                self._blend(lanes, old, noise, there)
            here, told = there, next_told
        mask = self.refine_masks[index].to(self.latents.dtype)
        self.x0[index] = mask * self.x0[index] + (1 - mask) * old
        present = self.schedule.here.at(self._index(self.step_index[lanes]))
        self.latents[index] = add_noise(self.x0[index], noise, present)
