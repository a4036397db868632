"""Actions: which are taken as given, which are admissible, and what becomes of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from addiff_env.env.config import EnvConfig
from addiff_env.env.state import LaneState
from addiff_env.types import Action


def read_actions(actions: Any, num_envs: int) -> np.ndarray:
    """Actions (B,) int64 as a caller passes them.

    Raises:
        ValueError: not B integers in {0, 1, 2}.
    """
    try:
        array = np.asarray(actions.cpu() if isinstance(actions, torch.Tensor) else actions)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"expected {num_envs} actions, got {actions!r}: {error}") from error
    if array.shape != (num_envs,):
        raise ValueError(f"expected {num_envs} actions, got {actions!r}")
    if not np.issubdtype(array.dtype, np.integer) or not np.isin(array, list(Action)).all():
        raise ValueError(f"actions must be integers in {{0, 1, 2}}, got {actions!r}")
    return array.astype(np.int64)


def admissible(config: EnvConfig, state: LaneState, lanes: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """What will be carried out (B,; -1 outside of ``lanes``).

    A capped refinement becomes continue, an unaffordable one becomes stop. Before the first evaluation there is nothing
    to stop with or to refine: every action continues.
    """
    taken = np.full(state.num_envs, -1)
    taken[lanes] = np.where(state.nfe[lanes] == 0, Action.CONTINUE, actions[lanes])
    refine = taken == Action.REFINE
    taken = np.where(refine & ~_affordable(config, state), Action.STOP, taken)
    return np.where(refine & ~_below_cap(config, state), Action.CONTINUE, taken)


def action_masks(config: EnvConfig, state: LaneState) -> np.ndarray:
    """Which actions are admissible now: (B, 3) bool; continue always is, stop once there is a prediction."""
    masks = np.ones((state.num_envs, len(Action)), bool)
    masks[:, Action.STOP] = state.nfe > 0
    masks[:, Action.REFINE] = _affordable(config, state) & _below_cap(config, state) & (state.nfe > 0)
    return masks


def spent(config: EnvConfig, state: LaneState) -> np.ndarray:
    """Whether the budget (B,) bool has no room for another step and its finish."""
    return state.nfe + 1 + config.finish_steps > state.budget


def _affordable(config: EnvConfig, state: LaneState) -> np.ndarray:
    """Whether the budget has room for a refinement and its finish."""
    return state.nfe + config.refine_k + config.finish_steps <= state.budget


def _below_cap(config: EnvConfig, state: LaneState) -> np.ndarray:
    return state.refines < (float("inf") if config.max_refines is None else config.max_refines)
