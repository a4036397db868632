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

SOLVERS = ("ddim", "dpmpp_2m", "euler")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
SPACINGS = ("leading", "linspace", "trailing")
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

    @classmethod
    def of_power(cls, alphas_cumprod: torch.Tensor) -> Level:
        """Levels of a variance-preserving process from its signal powers (B,) float64 in [0, 1]."""
        return cls(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())

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
    powers = _alphas_cumprod(config, total)
    prediction_type = config.get("prediction_type", "epsilon")
    if powers[-1] == 0 and solver == "ddim" and prediction_type == "epsilon":
        raise ValueError("prediction_type 'epsilon' with rescale_betas_zero_snr = True: x0 is undefined at zero signal")
    grid = _ddim_grid if solver == "ddim" else _dpm_grid
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


# --------------------------------------------------------------------------- diffusion models


def _alphas_cumprod(config: Mapping[str, Any], total: int) -> np.ndarray:
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


def _ddim_grid(config: Mapping[str, Any], powers: np.ndarray, number: int) -> _Grid:
    """Timesteps and levels of DDIM; the three spacings of Lin et al. 2024, table 2, as diffusers has them."""
    total, spacing = len(powers), _spacing(config, "leading")
    if spacing == "linspace":
        timesteps = np.linspace(0, total - 1, number).round()[::-1].astype(np.int64)
    elif spacing == "leading":
        timesteps = (np.arange(number) * (total // number)).round()[::-1].astype(np.int64)
        timesteps = timesteps + int(config.get("steps_offset", 0))
    else:
        timesteps = np.round(np.arange(total, 0, -total / number)).astype(np.int64) - 1
    following = timesteps - total // number  # diffusers' own notion of the next level
    last = 1.0 if config.get("set_alpha_to_one", True) else powers[0]
    current, next_level = powers[timesteps], np.where(following >= 0, powers[np.maximum(following, 0)], last)
    return timesteps.copy(), (current**0.5, (1 - current) ** 0.5), (next_level**0.5, (1 - next_level) ** 0.5)


def _dpm_grid(config: Mapping[str, Any], powers: np.ndarray, number: int) -> _Grid:
    """Timesteps and levels of DPM-Solver++ as diffusers has them; Karras levels: Karras et al. 2022, eq. 5."""
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
        return np.linspace(0, total - 1, number + 1).round()[::-1][:-1].astype(np.int64)
    if spacing == "leading":
        steps = (np.arange(number + 1) * (total // (number + 1))).round()[::-1][:-1].astype(np.int64)
        return np.minimum(steps + int(config.get("steps_offset", 0)), total - 1)
    return np.arange(total, 0, -total / number).round().astype(np.int64) - 1


def _preserving(ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, sigma) with alpha^2 + sigma^2 = 1 from sigma / alpha."""
    alpha = 1 / np.sqrt(1 + ratios**2)
    return alpha, ratios * alpha


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
