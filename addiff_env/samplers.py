"""Noise schedules and one-step solver updates in which every lane has its own step index.

diffusers' schedulers count steps for a whole batch (huggingface/diffusers issue 1784); here a step is
a pure function of (latents, x0, step_index), so lanes at different points of the grid share one call.
Schedules are float64; latents keep their dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

SOLVERS = ("ddim",)
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
UNSUPPORTED = ("clip_sample", "thresholding", "rescale_betas_zero_snr", "trained_betas")


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a model and the grid of one solver run.

    ``alphas_cumprod`` is the training schedule (T,); ``timesteps`` the grid (N,), noisiest first;
    ``alpha_from`` and ``alpha_to`` (N,) are the signal powers before and after each step. All float64
    on the device except ``timesteps`` (int64).
    """

    alphas_cumprod: torch.Tensor
    timesteps: torch.Tensor
    alpha_from: torch.Tensor
    alpha_to: torch.Tensor
    prediction_type: str

    @property
    def num_inference_steps(self) -> int:
        """N, the number of steps of the grid."""
        return len(self.timesteps)


def make_schedule(config: Mapping[str, Any], num_inference_steps: int, device: torch.device | str) -> Schedule:
    """Build the schedule from a diffusers ``scheduler_config.json``.

    Raises:
        ValueError: more steps than the model was trained with, none at all, or an option that is unknown.
    """
    total = int(config["num_train_timesteps"])
    if not 1 <= num_inference_steps <= total:
        raise ValueError(f"num_inference_steps must lie in [1, {total}], got {num_inference_steps}")
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"unknown prediction_type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")
    for name in UNSUPPORTED:  # refused, as leaving them out would give other pictures than diffusers'
        if config.get(name):
            raise ValueError(f"the scheduler option {name} = {config[name]!r} is not supported")
    alphas_cumprod = _alphas_cumprod(config)
    timesteps = _timesteps(config, num_inference_steps)
    following = timesteps - total // num_inference_steps  # diffusers' own notion of the next level
    last = 1.0 if config.get("set_alpha_to_one", True) else alphas_cumprod[0]
    alpha_to = np.where(following >= 0, alphas_cumprod[np.maximum(following, 0)], last)
    return Schedule(
        torch.from_numpy(alphas_cumprod).to(device),
        torch.from_numpy(timesteps).to(device),
        torch.from_numpy(alphas_cumprod[timesteps]).to(device),
        torch.from_numpy(alpha_to).to(device),
        prediction_type,
    )


def _alphas_cumprod(config: Mapping[str, Any]) -> np.ndarray:
    total, start, end = int(config["num_train_timesteps"]), float(config["beta_start"]), float(config["beta_end"])
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        betas = np.linspace(start, end, total)
    elif kind == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, total) ** 2
    else:
        raise ValueError(f"unknown beta_schedule {kind!r}; known: linear, scaled_linear")
    return np.cumprod(1 - betas)


def _timesteps(config: Mapping[str, Any], number: int) -> np.ndarray:
    """The grid (N,), noisiest first; the three spacings of Lin et al. 2024, table 2, as diffusers has them."""
    total, spacing = int(config["num_train_timesteps"]), config.get("timestep_spacing", "leading")
    if spacing == "linspace":
        return np.linspace(0, total - 1, number).round()[::-1].astype(np.int64).copy()
    if spacing == "leading":
        steps = (np.arange(number) * (total // number)).round()[::-1].astype(np.int64)
        return steps + int(config.get("steps_offset", 0))
    if spacing == "trailing":
        return np.round(np.arange(total, 0, -total / number)).astype(np.int64) - 1
    raise ValueError(f"unknown timestep_spacing {spacing!r}; known: leading, linspace, trailing")


def _lanes(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Per-lane numbers (B,) shaped to multiply latents (B, C, h, w)."""
    return values.view(-1, *[1] * (latents.ndim - 1))


def to_x0(
    output: torch.Tensor, latents: torch.Tensor, alphas_cumprod: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """Turn a network's output into its clean prediction x0 (B, C, h, w).

    ``alphas_cumprod`` (B,) float64 is each lane's signal power. Epsilon: Ho et al. 2020, eq. 15;
    v: Salimans & Ho 2022, appendix D.
    """
    a = _lanes(alphas_cumprod, latents)
    x, out = latents.double(), output.double()
    if prediction_type == "epsilon":
        x0 = (x - (1 - a).sqrt() * out) / a.sqrt()
    elif prediction_type == "v_prediction":
        x0 = a.sqrt() * x - (1 - a).sqrt() * out
    else:
        x0 = out
    return x0.to(latents.dtype)


def ddim_step(schedule: Schedule, latents: torch.Tensor, x0: torch.Tensor, step_index: torch.Tensor) -> torch.Tensor:
    """One DDIM step with eta 0 (Song, Meng & Ermon 2021, eq. 12) from each lane's grid point to the next."""
    return ddim_between(latents, x0, schedule.alpha_from[step_index], schedule.alpha_to[step_index])


def ddim_between(
    latents: torch.Tensor, x0: torch.Tensor, alpha_from: torch.Tensor, alpha_to: torch.Tensor
) -> torch.Tensor:
    """DDIM with eta 0 between two signal powers (B,), on the grid or off it."""
    a, b = _lanes(alpha_from, latents), _lanes(alpha_to, latents)
    clean = x0.double()
    epsilon = (latents.double() - a.sqrt() * clean) / (1 - a).sqrt()
    return (b.sqrt() * clean + (1 - b).sqrt() * epsilon).to(latents.dtype)


def add_noise(x0: torch.Tensor, noise: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Noise ``x0`` to the signal powers (B,): the forward process (Ho et al. 2020, eq. 4)."""
    a = _lanes(alphas_cumprod, x0)
    return (a.sqrt() * x0.double() + (1 - a).sqrt() * noise.double()).to(x0.dtype)
