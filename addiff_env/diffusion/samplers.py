"""Noise schedules and one-step solver updates in which every lane has its own step index.

diffusers' schedulers count steps for a whole batch (huggingface/diffusers issue 1784); here a step is
a pure function of (latents, x0, step_index), so lanes at different points of the grid share one call.
Schedules are float64; latents keep their dtype.

A noise level is a pair (alpha, sigma): noisy = alpha * x0 + sigma * noise. Diffusion models have
alpha^2 + sigma^2 = 1, flow-matching models alpha + sigma = 1; the updates serve both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from addiff_env.diffusion.grids import alphas_cumprod, ddim_grid, dpm_grid, shift_levels

SOLVERS = ("ddim", "dpmpp_2m", "euler")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
# Refused when set, as leaving them out would give other pictures than diffusers'.
_UNSUPPORTED = (
    "clip_sample",
    "thresholding",
    "use_lu_lambdas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_flow_sigmas",
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
)
_ALLOWED: dict[str, dict[str, tuple[Any, ...]]] = {  # options of which only some values are carried out
    "dpmpp_2m": {
        "algorithm_type": ("dpmsolver++",),
        "solver_type": ("midpoint", "heun"),
        "final_sigmas_type": ("zero", "sigma_min"),
        "variance_type": (None, "fixed_small", "fixed_large"),
        "lambda_min_clipped": (-math.inf,),
    },
    "ddim": {},
    "euler": {"use_karras_sigmas": (None, False), "time_shift_type": ("exponential", "linear")},
}


class Level(NamedTuple):
    """Noise levels of B lanes, float64 (B,) each: noisy = ``alpha`` * x0 + ``sigma`` * noise."""

    alpha: torch.Tensor
    sigma: torch.Tensor

    def at(self, index: Any) -> Level:
        """The levels of some lanes, by index."""
        return Level(self.alpha[index], self.sigma[index])

    def shaped(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``alpha`` and ``sigma`` shaped to multiply latents (B, C, h, w)."""
        shape = (-1, *[1] * (latents.ndim - 1))
        return self.alpha.view(shape), self.sigma.view(shape)


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a model and the grid of one solver run; tensors live on the device.

    ``timesteps`` (N,) is what the network takes at each grid point, noisiest first (int64; float64 for flow
    matching); ``current`` and ``next`` (N,) are the levels before and after each step. ``training`` (T,) and
    ``training_timesteps`` (T,) are the levels the model was trained at, cleanest first, and what it takes there.
    """

    solver: str
    prediction_type: str
    timesteps: torch.Tensor
    current: Level
    next: Level
    training: Level
    training_timesteps: torch.Tensor
    eta: float = 0.0  # ddim only
    heun: bool = False  # dpmpp_2m only: the other second-order correction
    first_order_end: bool = True  # dpmpp_2m only: the last step is of first order

    @property
    def num_inference_steps(self) -> int:
        """N, the number of steps of the grid."""
        return len(self.timesteps)

    @property
    def needs_noise(self) -> bool:
        """Whether `solver_step` draws on noise."""
        return self.eta > 0

    @property
    def multistep(self) -> bool:
        """Whether `solver_step` looks at the prediction before."""
        return self.solver == "dpmpp_2m"


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a ``scheduler_config.json`` is that of a flow-matching model."""
    return str(config.get("_class_name", "")).startswith("FlowMatch")


def make_schedule(
    config: Mapping[str, Any],
    num_inference_steps: int,
    device: torch.device | str,
    solver: str = "ddim",
    eta: float = 0.0,
    image_tokens: int | None = None,
) -> Schedule:
    """Build the schedule of ``solver`` from a diffusers ``scheduler_config.json``.

    ``eta`` is DDIM's share of fresh noise (Song, Meng & Ermon 2021, eq. 16). ``image_tokens`` is the
    transformer's sequence length, which shifts the levels of models with dynamic shifting (Flux).

    Raises:
        ValueError: more steps than the model was trained with, none at all, a solver that is unknown or does
            not fit the model, or a scheduler option that is unknown or not carried out; with the value.
    """
    total = int(config.get("num_train_timesteps", 1000))
    if not 1 <= num_inference_steps <= total:
        raise ValueError(f"num_inference_steps must lie in [1, {total}], got {num_inference_steps}")
    _check_options(config, solver, eta)
    if solver == "euler":
        return _flow_schedule(config, num_inference_steps, total, device, image_tokens)
    powers = alphas_cumprod(config, total)
    prediction_type = config.get("prediction_type", "epsilon")
    if powers[-1] == 0 and solver == "ddim" and prediction_type == "epsilon":
        raise ValueError("prediction_type 'epsilon' with rescale_betas_zero_snr = True: x0 is undefined at zero signal")
    grid = ddim_grid if solver == "ddim" else dpm_grid
    timesteps, current, next_level = grid(config, powers, num_inference_steps)
    short = num_inference_steps < 15 and config.get("lower_order_final", True)
    return Schedule(
        solver,
        prediction_type,
        torch.from_numpy(timesteps).to(device),
        _level(*current, device),
        _level(*next_level, device),
        _level(powers**0.5, (1 - powers) ** 0.5, device),
        torch.arange(total, device=device),
        eta,
        config.get("solver_type", "midpoint") == "heun",
        bool(short or config.get("euler_at_final", False) or config.get("final_sigmas_type", "zero") == "zero"),
    )


def _check_options(config: Mapping[str, Any], solver: str, eta: float) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
    if is_flow(config) != (solver == "euler"):
        fits = "euler" if is_flow(config) else "ddim, dpmpp_2m"
        raise ValueError(f"solver {solver!r} does not fit a {config.get('_class_name')} model; use {fits}")
    if eta < 0 or (eta > 0 and solver != "ddim"):
        raise ValueError(f"eta must be at least 0, and 0 unless the solver is ddim; got {eta!r} with {solver!r}")
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES[:3]:
        raise ValueError(f"unknown prediction_type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES[:3])}")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise ValueError(f"the scheduler option {name} = {config[name]!r} is not supported")
    for name, allowed in _ALLOWED[solver].items():
        if name in config and config[name] not in allowed and str(config[name]) not in map(str, allowed):
            raise ValueError(f"the scheduler option {name} = {config[name]!r} is not supported with {solver!r}")


def _level(alpha: np.ndarray, sigma: np.ndarray, device: torch.device | str) -> Level:
    return Level(*(torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64)).to(device) for v in (alpha, sigma)))


# --------------------------------------------------------------------------- flow-matching models


def _flow_schedule(
    config: Mapping[str, Any], number: int, total: int, device: torch.device | str, image_tokens: int | None
) -> Schedule:
    """Flux's grid: N equal steps of sigma from 1, shifted towards noise (Esser et al. 2024, eq. 23)."""
    sigma = shift_levels(config, np.linspace(1.0, 1.0 / number, number), image_tokens)
    trained = np.arange(1, total + 1) / total
    next_level = np.append(sigma[1:], 0.0)
    return Schedule(
        "euler",
        "flow_prediction",
        torch.from_numpy(sigma * total).to(device),
        _level(1 - sigma, sigma, device),
        _level(1 - next_level, next_level, device),
        _level(1 - trained, trained, device),
        torch.from_numpy(trained * total).to(device),
    )


# --------------------------------------------------------------------------- steps


def to_x0(output: torch.Tensor, latents: torch.Tensor, level: Level, prediction_type: str) -> torch.Tensor:
    """Turn a network's output into its clean prediction x0 (B, C, h, w) at each lane's ``level``.

    Epsilon: Ho et al. 2020, eq. 15; v: Salimans & Ho 2022, appendix D; flow: Liu et al. 2023, velocity noise - x0.
    """
    alpha, sigma = level.shaped(latents)
    x, out = latents.double(), output.double()
    if prediction_type == "epsilon":
        x0 = (x - sigma * out) / alpha
    elif prediction_type == "v_prediction":
        x0 = alpha * x - sigma * out
    elif prediction_type == "flow_prediction":
        x0 = x - sigma * out
    else:
        x0 = out
    return x0.to(latents.dtype)


def solver_step(
    schedule: Schedule,
    latents: torch.Tensor,
    x0: torch.Tensor,
    step_index: torch.Tensor,
    previous_x0: torch.Tensor | None = None,
    has_previous: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """One step of ``schedule.solver`` from each lane's grid point ``step_index`` (B,) to the next.

    ``previous_x0`` (B, C, h, w) is the prediction of the step before, where ``has_previous`` (B,) bool says that the
    lane has one: multistep solvers go by first order otherwise. ``noise`` (B, C, h, w) is what DDIM with eta > 0 adds.

    Raises:
        ValueError: noise or history is needed and missing.
    """
    current, next_level = schedule.current.at(step_index), schedule.next.at(step_index)
    if schedule.solver != "dpmpp_2m":  # Euler on a straight flow is DDIM with eta 0 in (alpha, sigma)
        return ddim_between(latents, x0, current, next_level, schedule.eta, noise)
    if previous_x0 is None or has_previous is None:
        raise ValueError("dpmpp_2m needs previous_x0 and has_previous")
    before = schedule.current.at((step_index - 1).clamp_min(0))
    second = has_previous & (step_index > 0)
    if schedule.first_order_end:
        second = second & (step_index < schedule.num_inference_steps - 1)
    return _dpmpp_2m(latents, x0, previous_x0, second, before, current, next_level, schedule.heun)


def ddim_between(
    latents: torch.Tensor,
    x0: torch.Tensor,
    current: Level,
    next_level: Level,
    eta: float = 0.0,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """DDIM between two levels, on the grid or off it (Song, Meng & Ermon 2021, eq. 12 and 16).

    Raises:
        ValueError: ``eta`` above 0 without ``noise``.
    """
    alpha, sigma = current.shaped(latents)
    next_alpha, next_sigma = next_level.shaped(latents)
    clean = x0.double()
    epsilon = (latents.double() - alpha * clean) / sigma
    if eta == 0:
        return (next_alpha * clean + next_sigma * epsilon).to(latents.dtype)
    if noise is None:
        raise ValueError(f"DDIM with eta {eta} needs noise")
    variance = (next_sigma / sigma) ** 2 * (1 - (alpha / next_alpha) ** 2)
    kept = (next_sigma**2 - eta**2 * variance).clamp_min(0).sqrt()
    return (next_alpha * clean + kept * epsilon + eta * variance.sqrt() * noise.double()).to(latents.dtype)


def ancestral_between(
    latents: torch.Tensor, x0: torch.Tensor, current: Level, next_level: Level, noise: torch.Tensor
) -> torch.Tensor:
    """A draw from the posterior at the next level, given ``x0``: DDIM with eta 1 (Ho et al. 2020, eq. 6 and 7).

    Written for any (alpha, sigma), so that it is a stochastic solver of flow-matching models as well.
    """
    alpha, sigma = current.shaped(latents)
    next_alpha, next_sigma = next_level.shaped(latents)
    added = (sigma**2 - (alpha / next_alpha) ** 2 * next_sigma**2).clamp_min(0)  # variance from next to current
    variance = next_sigma**2 / sigma**2 * added
    epsilon = (latents.double() - alpha * x0.double()) / sigma
    kept = (next_sigma**2 - variance).clamp_min(0).sqrt()
    return (next_alpha * x0.double() + kept * epsilon + variance.sqrt() * noise.double()).to(latents.dtype)


def renoise_between(latents: torch.Tensor, current: Level, noisier: Level, noise: torch.Tensor) -> torch.Tensor:
    """Noise latents from their own level to a noisier one: the forward process between the two."""
    alpha, sigma = current.shaped(latents)
    to_alpha, to_sigma = noisier.shaped(latents)
    share = to_alpha / alpha
    added = (to_sigma**2 - share**2 * sigma**2).clamp_min(0).sqrt()
    return (share * latents.double() + added * noise.double()).to(latents.dtype)


def _dpmpp_2m(
    latents: torch.Tensor,
    x0: torch.Tensor,
    previous_x0: torch.Tensor,
    second: torch.Tensor,
    before: Level,
    current: Level,
    next_level: Level,
    heun: bool,
) -> torch.Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), of first order where ``second`` (B,) is False."""
    shape = (-1, *[1] * (latents.ndim - 1))
    # the last may be infinite
    lambdas = [(level.alpha / level.sigma).log().view(shape) for level in (before, current, next_level)]
    h, h_before = lambdas[2] - lambdas[1], lambdas[1] - lambdas[0]
    _, sigma = current.shaped(latents)
    next_alpha, next_sigma = next_level.shaped(latents)
    shrink = -torch.expm1(-h)  # 1 - e^-h
    clean, use = x0.double(), second.view(shape)
    slope = (clean - previous_x0.double()) * h / torch.where(use, h_before, torch.ones_like(h_before))
    correction = (1 - shrink / h) * slope if heun else 0.5 * shrink * slope
    correction = torch.where(use, correction, torch.zeros_like(correction))  # h may be infinite where not used
    return (next_sigma / sigma * latents.double() + next_alpha * (shrink * clean + correction)).to(latents.dtype)


def add_noise(x0: torch.Tensor, noise: torch.Tensor, level: Level) -> torch.Tensor:
    """Noise ``x0`` to each lane's ``level``: the forward process (Ho et al. 2020, eq. 4)."""
    alpha, sigma = level.shaped(x0)
    return (alpha * x0.double() + sigma * noise.double()).to(x0.dtype)
