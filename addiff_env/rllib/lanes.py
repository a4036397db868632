"""The environment as an env runner takes it, and a first look at it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode

import addiff_env  # noqa: F401, registers the ids in the worker
from addiff_env.agent import CALIBRATION_SHARES, PartNorm, describe_backbone
from addiff_env.env.vector import DiffusionDenoiseVectorEnv


def make_lanes(context: Mapping[str, Any]) -> gym.vector.VectorEnv:
    """What an env runner calls: ``id`` and ``kwargs`` of an environment, and ``num_envs`` as RLlib adds it.

    Relative paths are relative to ``folder``, if it is given and there is such a folder here.

    Lanes restart in the step after the one that ended them (Gymnasium's default), which RLlib relies on.
    """
    with _standing_in(context.get("folder")):
        return gym.make_vec(
            context["id"],
            num_envs=context.get("num_envs", 1),
            autoreset_mode=AutoresetMode.NEXT_STEP,
            **context["kwargs"],
        )


@contextmanager
def _standing_in(folder: str | None) -> Iterator[None]:
    before = os.getcwd()
    if folder and os.path.isdir(folder):
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@dataclass(frozen=True)
class Survey:
    """What a training has to know of its environment beforehand."""

    norm: PartNorm  # calibrated
    backbone: dict[str, Any]  # as the agent bundle describes it
    reward: dict[str, float]


def survey(context: Mapping[str, Any], steps: int, seed: int, gains: Mapping[str, float] | None = None) -> Survey:
    """Play ``steps`` random steps on the lanes that ``context`` makes.

    Raises:
        ValueError: observations other than flat NumPy arrays, or ``gains`` of parts that they do not have.
    """
    wrapped = make_lanes(context)
    lanes = wrapped.unwrapped
    assert isinstance(lanes, DiffusionDenoiseVectorEnv)
    layout = (lanes.config.obs_mode, lanes.config.obs_backend)
    if layout != ("flat", "numpy"):
        raise ValueError(f"RLlib needs obs_mode 'flat' and obs_backend 'numpy', got {layout}")
    norm = PartNorm(lanes.parts)
    norm.calibrate(
        lambda: wrapped.reset(seed=seed)[0],
        lambda actions: wrapped.step(actions)[0],
        steps,
        CALIBRATION_SHARES,
        seed,
        gains,
    )
    backbone = describe_backbone(lanes)
    wrapped.close()
    return Survey(norm, backbone, dict(vars(lanes.reward_config)))
