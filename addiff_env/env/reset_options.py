"""What ``reset`` takes: seeds of the stream that episodes are drawn from, and options that name the episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gymnasium.utils import seeding

from addiff_env.env.config import EnvConfig
from addiff_env.env.denoiser import Denoiser
from addiff_env.env.prices import check_price
from addiff_env.env.prompts import check_prompt
from addiff_env.env.validation import as_list, check_seed, checked, plain, shown

LANE_OPTIONS = ("prompt", "negative_prompt", "seed", "latents", "price", "max_nfe")  # one value per lane each
COMMON = ("price", "max_nfe")  # of these, what may also be one number for all


def as_mapping(options: Any) -> dict[str, Any]:
    """The options as a dictionary of its own; TypeError for anything but a mapping or None."""
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"reset options must be a mapping, got {options!r}")
    return dict(options or {})


def lanes_to_reset(mask: Any, num_envs: int) -> np.ndarray:
    """The lanes that ``reset_mask`` (B,) bool names; None: all of them. ValueError for another size or type."""
    if mask is None:
        return np.arange(num_envs)
    mask = np.asarray(plain(mask))
    if mask.shape != (num_envs,) or mask.dtype != bool or not mask.any():
        raise ValueError(f"reset_mask must be {num_envs} booleans, at least one True, got {mask!r}")
    return np.flatnonzero(mask)


def lane_numbers(lanes: Any, num_envs: int) -> np.ndarray:
    """Numbers (L,) of the lanes that numbers (L,) or a mask (B,) bool name; ValueError for lanes that there are not."""
    values = np.asarray(plain(lanes))
    if values.shape == (num_envs,) and values.dtype == bool:
        return np.flatnonzero(values)
    numbers = values.astype(np.int64) if values.size == 0 else values
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer) or not np.isin(numbers, range(num_envs)).all():
        raise ValueError(f"lanes must be numbers below {num_envs}, or {num_envs} booleans, got {shown(lanes)}")
    return numbers


def lane_seeds(seed: int | Sequence[int | None], num_envs: int) -> list[int | None] | int:
    """One checked seed of the common stream, or one for each lane's own.

    Raises:
        ValueError, TypeError: no seed, or not one per lane; the message shows the value.
    """
    values = plain(seed)
    if not isinstance(values, list):
        return check_seed(seed)
    if len(values) != num_envs:
        raise ValueError(f"{len(values)} seeds for {num_envs} lanes: {shown(seed)}")
    return [None if value is None else check_seed(value) for value in values]


def lane_streams(seeds: list[int | None], common: np.random.Generator) -> list[np.random.Generator]:
    """Each lane's own draws, as single environments would have; those without a seed share the ``common`` stream."""
    return [common if value is None else seeding.np_random(value)[0] for value in seeds]


def read_options(options: dict[str, Any], number: int, denoiser: Denoiser) -> dict[str, Any]:
    """The `LANE_OPTIONS` of ``number`` lanes, checked.

    Raises:
        TypeError, ValueError: an option that there is not, a prompt that is no string, a seed that is no whole number,
        latents of another shape or not finite, a price that is none or outside of ``price_range``, a budget that leaves
        no decision, or the wrong number of any of them; the message shows the value.
    """
    given = {"defer_warmup": checked("defer_warmup", options.pop("defer_warmup", False), bool)}
    if unknown := set(options) - set(LANE_OPTIONS):
        known = ", ".join(LANE_OPTIONS)
        raise ValueError(f"unknown reset options {sorted(unknown)}; known: {known}, reset_mask, defer_warmup")
    for name, value in options.items():
        rows = value if name == "latents" and depth(value) > 1 else as_list(value)
        if name in COMMON and rows is None:
            rows = [value] * number  # the same for all
        if rows is None:
            raise TypeError(f"the vector environment takes one {name} per lane, got {shown(value)}")
        if len(rows) != number:
            raise ValueError(f"{len(rows)} {name} values for {number} lanes: {str(value)[:200]}")
        given[name] = rows
    for name, check in (("prompt", check_prompt), ("seed", check_seed)):
        if name in given:
            given[name] = [check(value) for value in given[name]]
    if "negative_prompt" in given:
        given["negative_prompt"] = [_read_negative_prompt(value, denoiser) for value in given["negative_prompt"]]
    if "price" in given:
        within = denoiser.config.price_range
        given["price"] = [None if value is None else check_price(value, within) for value in given["price"]]
    if "max_nfe" in given:
        given["max_nfe"] = [_read_budget(value, denoiser.config) for value in given["max_nfe"]]
    if "latents" in given:
        given["latents"] = _read_latents(given["latents"], denoiser)
    return given


def _read_negative_prompt(value: Any, denoiser: Denoiser) -> str | None:
    if value is None:
        return None
    denoiser.backbone.check_negative_prompt(check_prompt(value), denoiser.config.guidance_scale)
    return value


def _read_budget(value: Any, config: EnvConfig) -> int:
    return config.nfe_budget if value is None else replace(config, max_nfe=value).nfe_budget


def _read_latents(values: Any, denoiser: Denoiser) -> torch.Tensor:
    """Initial latents (B, C, h, w) on the device, of a tensor, an array or a sequence of lanes."""
    try:
        rows = values if hasattr(values, "shape") else torch.stack([torch.as_tensor(row) for row in values])
        rows = torch.as_tensor(rows)
        if rows.is_complex() or rows.dtype == torch.bool:
            raise TypeError(f"they are {rows.dtype}")
        latents = rows.to(denoiser.backbone.device, denoiser.backbone.dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"latents must be numbers (B, C, h, w), got {str(values)[:200]}: {error}") from error
    if latents.shape[1:] != denoiser.latent_shape:
        raise ValueError(f"latents must be (B, {denoiser.latent_shape}), got {tuple(latents.shape)}")
    if not torch.isfinite(latents).all():
        raise ValueError(f"latents must be finite, {int((~latents.isfinite()).sum())} of their values are not")
    return latents


def depth(value: Any) -> int:
    """How many dimensions an array, a tensor or nested sequences have."""
    if hasattr(value, "ndim"):
        return int(value.ndim)
    return 1 + depth(value[0]) if isinstance(value, (list, tuple)) and value else 0
