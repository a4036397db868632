"""The timesteps and noise levels that solvers step along, from a diffusers ``scheduler_config.json``; float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

SPACINGS = ("leading", "linspace", "trailing")


# --------------------------------------------------------------------------- diffusion models


def alphas_cumprod(config: Mapping[str, Any], total: int) -> np.ndarray:
    """Signal powers (T,) of the training schedule."""
    powers = np.cumprod(1 - _betas(config, total))
    if config.get("rescale_betas_zero_snr"):  # Lin et al. 2024, algorithm 1
        root = np.sqrt(powers)
        powers = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return powers


def _betas(config: Mapping[str, Any], total: int) -> np.ndarray:
    if config.get("trained_betas") is not None:
        return np.asarray(config["trained_betas"], dtype=np.float64)
    kind = config.get("beta_schedule", "linear")
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    if kind == "linear":
        return np.linspace(start, end, total)
    if kind == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, total) ** 2
    if kind == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17
        curve = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - curve[1:] / curve[:-1], 0.999)
    raise ValueError(f"unknown beta_schedule {kind!r}; known: linear, scaled_linear, squaredcos_cap_v2")


def _spacing(config: Mapping[str, Any], default: str) -> str:
    spacing = config.get("timestep_spacing", default)
    if spacing not in SPACINGS:
        raise ValueError(f"unknown timestep_spacing {spacing!r}; known: {', '.join(SPACINGS)}")
    return spacing


_Grid = tuple[np.ndarray, tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def _trailing(total: int, number: int) -> np.ndarray:
    """N timesteps of the ``trailing`` spacing; for 61 steps of 1000 and the like, rounding would add one below 0."""
    return np.arange(total, 0, -total / number)[:number].round().astype(np.int64) - 1


def _require_falling(timesteps: np.ndarray, total: int, spacing: str) -> None:
    """Refuse timesteps beyond the training's, or the same one twice, between which a solver has nowhere to go."""
    if timesteps[0] >= total or (np.diff(timesteps) >= 0).any():
        raise ValueError(
            f"num_inference_steps {len(timesteps)} are too many for timestep_spacing {spacing!r} of {total} training "
            "steps: take fewer"
        )


def ddim_grid(config: Mapping[str, Any], powers: np.ndarray, number: int) -> _Grid:
    """Timesteps and levels of DDIM; the three spacings of Lin et al. 2024, table 2, as diffusers has them.

    Raises:
        ValueError: more steps than the spacing has timesteps for.
    """
    total, spacing = len(powers), _spacing(config, "leading")
    if spacing == "linspace":
        timesteps = np.linspace(0, total - 1, number).round()[::-1].astype(np.int64)
    elif spacing == "leading":
        timesteps = np.arange(number)[::-1] * (total // number) + int(config.get("steps_offset", 0))
    else:
        timesteps = _trailing(total, number)
    _require_falling(timesteps, total, spacing)
    following = timesteps - total // number  # diffusers' own notion of the next level
    last = 1.0 if config.get("set_alpha_to_one", True) else powers[0]
    current, next_level = powers[timesteps], np.where(following >= 0, powers[np.maximum(following, 0)], last)
    return timesteps.copy(), (current**0.5, (1 - current) ** 0.5), (next_level**0.5, (1 - next_level) ** 0.5)


def dpm_grid(config: Mapping[str, Any], powers: np.ndarray, number: int) -> _Grid:
    """Timesteps and levels of DPM-Solver++ as diffusers has them; Karras levels: Karras et al. 2022, eq. 5.

    Raises:
        ValueError: as `ddim_grid`.
    """
    if powers[-1] == 0:
        powers = powers.copy()
        powers[-1] = 2.0**-24  # diffusers' stand-in for zero signal, at which lambda would be infinite
    ratios = np.sqrt((1 - powers) / powers)  # sigma / alpha, rising
    if config.get("use_karras_sigmas"):
        ramp, rho = np.linspace(0, 1, number), 7.0
        levels = (ratios[-1] ** (1 / rho) + ramp * (ratios[0] ** (1 / rho) - ratios[-1] ** (1 / rho))) ** rho
        timesteps = np.interp(np.log(levels), np.log(ratios), np.arange(len(ratios)))
        if config.get("beta_schedule", "linear") != "squaredcos_cap_v2":
            timesteps = timesteps.round()
        timesteps = timesteps.astype(np.int64)
    else:
        timesteps = _dpm_timesteps(config, len(powers), number)
        levels = ratios[timesteps]
    end = 0.0 if config.get("final_sigmas_type", "zero") == "zero" else ratios[0]
    following = np.append(levels[1:], end)
    return timesteps, _preserving(levels), _preserving(following)


def _dpm_timesteps(config: Mapping[str, Any], total: int, number: int) -> np.ndarray:
    spacing = _spacing(config, "linspace")
    if spacing == "linspace":
        timesteps = np.linspace(0, total - 1, number + 1).round()[::-1][:-1].astype(np.int64)
    elif spacing == "leading":
        steps = np.arange(number, 0, -1) * (total // (number + 1))
        timesteps = np.minimum(steps + int(config.get("steps_offset", 0)), total - 1)
    else:
        timesteps = _trailing(total, number)
    _require_falling(timesteps, total, spacing)
    return timesteps


def _preserving(ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, sigma) with alpha^2 + sigma^2 = 1 from sigma / alpha."""
    alpha = 1 / np.sqrt(1 + ratios**2)
    return alpha, ratios * alpha


def shift_levels(config: Mapping[str, Any], sigma: np.ndarray, image_tokens: int | None) -> np.ndarray:
    """Shift levels sigma (N,) in (0, 1] as the model's schedule says, by a constant or by the picture's size.

    Raises:
        ValueError: the schedule depends on the size and ``image_tokens`` is None.
    """
    if not config.get("use_dynamic_shifting", False):
        shift = float(config.get("shift", 1.0))
        return shift * sigma / (1 + (shift - 1) * sigma)
    if image_tokens is None:
        raise ValueError("this model's schedule depends on the picture's size: image_tokens must be given")
    few, many = int(config.get("base_image_seq_len", 256)), int(config.get("max_image_seq_len", 4096))
    low, high = float(config.get("base_shift", 0.5)), float(config.get("max_shift", 1.15))
    mu = low + (high - low) * (image_tokens - few) / (many - few)
    weight = math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
    return weight / (weight + (1 / sigma - 1))
