"""One lane: the view of the vector environment that `gymnasium.make` gives."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from addiff_env.env.config import EnvConfig
from addiff_env.env.info import Info
from addiff_env.env.observer import observation_of
from addiff_env.env.prompts import check_prompt
from addiff_env.env.reset_options import as_mapping, depth
from addiff_env.env.spec import JsonableSpec
from addiff_env.env.validation import check_seed, plain
from addiff_env.env.vector import DiffusionDenoiseVectorEnv


class DiffusionDenoiseEnv(JsonableSpec, gym.Env):
    """One lane of `DiffusionDenoiseVectorEnv`, whose docstring is the specification.

    Arguments are the same but for ``num_envs`` and ``autoreset_mode``; ``reset(options={"prompt": str, "seed": int,
    "negative_prompt": str, "price": float, "max_nfe": int, "latents": (C, h, w) or (1, C, h, w)})``.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, **settings: Any) -> None:
        self.vector = DiffusionDenoiseVectorEnv(num_envs=1, autoreset_mode=AutoresetMode.DISABLED, **settings)
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        self.render_mode = self.vector.render_mode

    @property
    def config(self) -> EnvConfig:
        """The settings."""
        return self.vector.config

    @property
    def latents(self) -> torch.Tensor:
        """The live latents (1, C, h, w) on the device."""
        return self.vector.latents

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode; see `DiffusionDenoiseVectorEnv.reset`."""
        seed = None if seed is None else check_seed(seed)
        options = {name: self._one(name, value) for name, value in as_mapping(options).items()}
        self.vector.np_random = self.np_random  # one stream of random numbers, the one users can seed
        observation, info = self.vector.reset(seed=seed, options=options)
        if seed is not None:  # nothing was refused
            self._np_random, self._np_random_seed = self.vector.np_random, seed
        return observation_of(observation, 0), _single_info(info)

    def close(self) -> None:
        """Let go of the models; see `DiffusionDenoiseVectorEnv.close_extras`."""
        self.vector.close()

    def _one(self, name: str, value: Any) -> Any:
        if name == "defer_warmup" or (name == "latents" and depth(value) == 4):
            return value
        return [check_prompt(value) if name == "prompt" else value]

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Carry out one action.

        Raises:
            gymnasium.error.ResetNeeded: no episode is running; ValueError: not 0, 1 or 2.
        """
        observation, reward, terminated, truncated, info = self.vector.step([plain(action)])
        return (
            observation_of(observation, 0),
            float(reward[0]),
            bool(terminated[0]),
            bool(truncated[0]),
            _single_info(info),
        )

    def action_masks(self) -> np.ndarray:
        """Which actions are admissible now: (3,) bool."""
        return self.vector.action_masks()[0]

    def final_image(self) -> np.ndarray:
        """The final picture, uint8 (H, W, 3); RuntimeError before the end."""
        return self.vector.final_image(0)

    def render(self) -> np.ndarray | None:
        """The final picture, or the preview before the end: uint8 (H, W, 3)."""
        pictures = self.vector.render()
        return None if pictures is None else pictures[0]


def _single_info(info: Info) -> Info:
    """The info of lane 0, without the vector form's presence masks."""
    return Info.of(_first_lane(info), _first_lane(info.texts))


def _first_lane(values: dict[str, Any]) -> dict[str, Any]:
    firsts = {name: value[0] for name, value in values.items() if not name.startswith("_")}
    return {name: first.item() if isinstance(first, np.generic) else first for name, first in firsts.items()}
