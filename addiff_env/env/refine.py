"""RegionRefine: re-denoise the regions that came out badly, and leave the rest as it is."""

from __future__ import annotations

import numpy as np
import torch

from addiff_env.diffusion.attention import refinement_mask
from addiff_env.diffusion.samplers import Level, add_noise
from addiff_env.env.denoiser import Denoiser, Work, reset_solver_history
from addiff_env.env.state import LaneState


def refine(denoiser: Denoiser, state: LaneState, lanes: np.ndarray, masks: torch.Tensor | None = None) -> None:
    """Refine ``lanes`` (L,) once, as ``refine_mode`` says: ``refine_k`` evaluations each.

    The lane's whole x0 is noised to the level t'; before each evaluation the outside of the mask is
    held to its own x0 noised to that evaluation's level, so that the denoiser never sees a half-clean latent.
    ``masks`` (L, 1, h, w) in [0, 1], 1 = renew, are by default those of the setting, see `make_masks`.
    """
    denoiser.carry_out(state, refining(denoiser, state, lanes, masks))


def refining(denoiser: Denoiser, state: LaneState, lanes: np.ndarray, masks: torch.Tensor | None = None) -> Work:
    """What `refine` does."""
    if len(lanes) == 0:
        return lanes
    state.refine_masks[state.index(lanes)] = make_masks(denoiser, state, lanes) if masks is None else masks
    state.refines[lanes] += 1
    reset_solver_history(state, lanes)
    refine_lanes = _rewind if denoiser.config.refine_mode == "rewind" else _refine_in_place
    left = yield from refine_lanes(denoiser, state, lanes)
    reset_solver_history(state, left)
    return left


def make_masks(denoiser: Denoiser, state: LaneState, lanes: np.ndarray, kind: str | None = None) -> torch.Tensor:
    """Refinement masks (L, 1, h, w) of ``lanes`` from the latest evaluation's attention; ``kind`` None: the setting."""
    c, index, noise = denoiser.config, state.index(lanes), None
    kind = c.mask if kind is None else kind
    if kind == "random":
        side = state.maps.shape[-2:]
        drawn = torch.stack([torch.randn(1, *side, generator=state.generators[lane]) for lane in lanes])
        noise = drawn.to(state.maps.device, non_blocking=True)
    height, width = state.latents.shape[2:]
    content = state.conditioning.content[index]
    return refinement_mask(kind, state.maps[index], content, (height, width), c.mask_threshold, c.blur_sigma, noise)


def _renoise_index(denoiser: Denoiser, state: LaneState, lanes: np.ndarray) -> np.ndarray:
    """Index (L,) into the training levels of t', where ``lanes`` go back to."""
    indices = denoiser.renoise_indices
    return indices[np.minimum(state.step_index[lanes], len(indices) - 1)]


def _rewind(denoiser: Denoiser, state: LaneState, lanes: np.ndarray) -> Work:
    """Go back to the grid point nearest t' and step on from there, for k ordinary solver steps."""
    index, schedule, k = state.index(lanes), denoiser.schedule, denoiser.config.refine_k
    target = denoiser.training_timesteps[_renoise_index(denoiser, state, lanes)]
    nearest = np.abs(denoiser.timesteps[None] - target[:, None]).argmin(1)
    nearest = np.minimum(nearest, state.step_index[lanes])  # a refinement never skips steps
    state.step_index[lanes] = nearest
    old, noise = state.x0[index].clone(), denoiser.fresh_noise(state, lanes)
    state.latents[index] = add_noise(old, noise, schedule.current.at(state.index(nearest)))
    running = np.ones(len(lanes), bool)
    for j in range(k):
        going = lanes[running]
        ends = state.step_index[going] + 1 == schedule.num_inference_steps
        yield from denoiser.stepping(state, going, capture=bool(j + 1 == k or ends.any()))
        # Before the next evaluation the outside is brought to that evaluation's own noise level.
        rows = state.index(np.flatnonzero(running))
        reached = schedule.next.at(state.index(state.step_index[going] - 1))
        _hold_latents(state, going, old[rows], noise[rows], reached)
        _hold_x0(state, going, old[rows])
        running &= ~state.done[lanes]
    return lanes[running]


def _refine_in_place(denoiser: Denoiser, state: LaneState, lanes: np.ndarray) -> Work:
    """Renew x0 inside the mask from t' down in k coarse steps, then noise it back to where the lane stands."""
    index, schedule, steps = state.index(lanes), denoiser.schedule, denoiser.config.refine_k
    old, noise = state.x0[index].clone(), denoiser.fresh_noise(state, lanes)
    trained = state.index(_renoise_index(denoiser, state, lanes))
    start, level = schedule.training_timesteps[trained], schedule.training.at(trained)
    state.latents[index] = add_noise(old, noise, level)
    for j, (timesteps, current, next_level) in enumerate(denoiser.coarse_path(start, level, steps)):
        last = j + 1 == steps
        yield from denoiser.coarse_step(state, lanes, timesteps, current, next_level, capture=last)
        if not last:
            _hold_latents(state, lanes, old, noise, next_level)
    _hold_x0(state, lanes, old)
    present = schedule.current.at(state.index(state.step_index[lanes]))
    state.latents[index] = add_noise(state.x0[index], noise, present)
    return lanes


def _hold_latents(state: LaneState, lanes: np.ndarray, old: torch.Tensor, noise: torch.Tensor, level: Level) -> None:
    """Set latents outside the mask to the ``old`` x0 noised to ``level``."""
    index = state.index(lanes)
    mask = state.refine_masks[index].to(state.latents.dtype)
    state.latents[index] = mask * state.latents[index] + (1 - mask) * add_noise(old, noise, level)


def _hold_x0(state: LaneState, lanes: np.ndarray, old: torch.Tensor) -> None:
    """Set x0 outside the mask to the ``old`` one."""
    index = state.index(lanes)
    mask = state.refine_masks[index].to(state.x0.dtype)
    state.x0[index] = mask * state.x0[index] + (1 - mask) * old
