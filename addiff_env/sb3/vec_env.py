"""The vector environment as Stable-Baselines3 expects it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv

from addiff_env.env.baseline_cache import BaselineCache
from addiff_env.env.reward import COLUMNS, COMPONENTS, RewardConfig, relative_to_baseline
from addiff_env.env.validation import check_seed
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.sb3.episodes import PromptOrder

_TRIES = 3  # of a lane whose numbers are not finite before the first decision
_SCALARS = ("seed", "price", "nfe", "net_flops", "step_index", "action_taken", "clip_score", "reward_score", "fault")


def make_vec_env(env_id: str, num_envs: int, **kwargs: Any) -> DenoiseVecEnv:
    """Make a registered id as an SB3 `VecEnv` of ``num_envs`` lanes."""
    return DenoiseVecEnv(make_lanes(env_id, num_envs, **kwargs))


def make_lanes(env_id: str, num_envs: int, **kwargs: Any) -> DiffusionDenoiseVectorEnv:
    """Make a registered id with lanes that wait when they have ended."""
    unwrapped = gym.make_vec(env_id, num_envs=num_envs, autoreset_mode=AutoresetMode.DISABLED, **kwargs).unwrapped
    assert isinstance(unwrapped, DiffusionDenoiseVectorEnv)
    return unwrapped


def observation_parts(env: DiffusionDenoiseVectorEnv) -> dict[str, int]:
    """Widths of the flat observation's parts, in order."""
    return env.parts


class DenoiseVecEnv(VecEnv):
    """`DiffusionDenoiseVectorEnv` as an SB3 `VecEnv`; a lane restarts in the step that ends it, as SB3 wants.

    The lanes' prompts, seeds and prices come from ``order``; with ``baselines``, the terminal quality is counted from
    the fixed-step quality of the same prompt and seed.

    Raises:
        ValueError: lanes that restart by themselves, or observations other than flat NumPy arrays.
    """

    def __init__(
        self,
        env: DiffusionDenoiseVectorEnv,
        order: PromptOrder | None = None,
        baselines: BaselineCache | None = None,
    ) -> None:
        if env.autoreset_mode != AutoresetMode.DISABLED:
            raise ValueError(f"the adapter restarts lanes itself: autoreset_mode DISABLED, got {env.autoreset_mode}")
        layout = (env.config.obs_mode, env.config.obs_backend)
        if layout != ("flat", "numpy"):
            raise ValueError(f"SB3 needs obs_mode 'flat' and obs_backend 'numpy', got {layout}")
        self.env, self.baselines = env, baselines
        self.order = PromptOrder(env.prompts) if order is None else order
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    @property
    def reward_config(self) -> RewardConfig:
        """The reward's weights and scales; training may move them between rollouts."""
        return self.env.reward_config

    @reward_config.setter
    def reward_config(self, config: RewardConfig) -> None:
        self.env.set_reward(config)

    # ----------------------------------------------------------------- VecEnv

    def seed(self, seed: int | None = None) -> list[int | None]:
        """Seed the stream of prompts and initial noises, from the next episode on."""
        number = None if seed is None else check_seed(seed)
        self.order.seed(number)
        return [number] * self.num_envs

    def reset(self) -> np.ndarray:
        """Start every lane, by `set_options`' ``prompt``, ``seed`` and ``price`` where given; observations (B, width).

        Raises:
            ValueError: an option that is none of these.
            RuntimeError: lanes whose numbers are not finite before the first decision, however often they are drawn.
                A seed that was named is not drawn again: its lane's first step ends it, with the penalty of a fault.
        """
        observations, info = self._start(np.arange(self.num_envs), self._options)
        self._reset_options()
        self.reset_infos = [self._lane_info(info, info["reward_components"], lane) for lane in range(self.num_envs)]
        return observations

    def _start(self, lanes: np.ndarray, options: Sequence[dict[str, Any]]) -> tuple[np.ndarray, dict[str, Any]]:
        """Start ``lanes``; those that break down in their warm-up had nothing to decide and are drawn again."""
        for left in reversed(range(_TRIES)):
            started = self._draw(lanes, options)
            broken = self.env.done[lanes] | self.env.fault[lanes]
            again = [row for row in np.flatnonzero(broken).tolist() if "seed" not in options[row]]
            lanes, options = lanes[again], [options[row] for row in again]
            if len(lanes) == 0:
                return started
            if left:
                warnings.warn(f"{len(lanes)} lanes were not finite in their warm-up and are drawn again", stacklevel=2)
        dtype = self.env.backbone.dtype_name
        raise RuntimeError(f"{len(lanes)} lanes were not finite in {_TRIES} warm-ups in {dtype}: try another dtype")

    def _draw(self, lanes: np.ndarray, options: Sequence[dict[str, Any]]) -> tuple[np.ndarray, dict[str, Any]]:
        chosen: dict[str, list[Any]] = {"prompt": [], "seed": [], "price": []}
        for option in options:
            if unknown := set(option) - set(chosen):
                raise ValueError(f"unknown options {sorted(unknown)}; known: {', '.join(chosen)}")
            prompt, seed = self.order.draw()
            drawn = {"prompt": prompt, "seed": seed, "price": self.order.draw_price()}
            for name, values in chosen.items():
                values.append(option.get(name, drawn[name]))
        return self.env.reset(options={**chosen, "reset_mask": np.isin(np.arange(self.num_envs), lanes)})

    def step_async(self, actions: np.ndarray) -> None:
        """Remember the actions."""
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Carry them out; restart what ended."""
        observations, _, terminated, truncated, info = self.env.step(self._actions)
        dones, parts = terminated | truncated, self._reward(info, terminated)
        infos = [self._lane_info(info, parts, lane) for lane in range(self.num_envs)]
        for lane, lane_info in enumerate(infos):
            lane_info["TimeLimit.truncated"] = bool(truncated[lane] and not terminated[lane])
        ended = np.flatnonzero(dones)
        if len(ended):
            observations = self._restart(ended, observations, infos)
        return observations, parts["total"].astype(np.float32), dones, infos

    def _reward(self, info: dict[str, Any], terminated: np.ndarray) -> dict[str, np.ndarray]:
        """Components (B,) each, the terminal one relative to the baselines if there are any."""
        parts = {name: info["reward_components"][name] for name in COLUMNS}
        if self.baselines is None or not terminated.any():
            return parts
        baseline = np.full(self.num_envs, np.nan)
        ended = np.flatnonzero(terminated)
        prompts = [self.env.prompt[lane] for lane in ended]
        baseline[ended] = self.baselines.quality(prompts, info["seed"][ended], self.reward_config)
        return relative_to_baseline(self.reward_config, parts, baseline, terminated)

    def _restart(self, ended: np.ndarray, last: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        observations, info = self._start(ended, [{}] * len(ended))
        for lane in map(int, ended):
            infos[lane]["terminal_observation"] = last[lane].copy()
            self.reset_infos[lane] = self._lane_info(info, info["reward_components"], lane)
        return observations

    def _lane_info(self, info: dict[str, Any], parts: Any, lane: int) -> dict[str, Any]:
        scalars = {name: info[name][lane].item() for name in _SCALARS}
        reward = {name: float(parts[name][lane]) for name in COMPONENTS}
        mask = info["action_mask"][lane].copy()
        return scalars | {"prompt": self.env.prompt[lane], "action_mask": mask, "reward_components": reward}

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_images(self) -> list[np.ndarray | None]:
        """Each lane's preview, uint8 (H, W, 3); needs ``render_mode="rgb_array"``."""
        pictures = self.env.render()
        return [None] * self.num_envs if pictures is None else list(pictures)

    def action_masks(self) -> np.ndarray:
        """Which actions are admissible now: (B, 3) bool."""
        return self.env.action_masks()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute of each asked lane: its own entry of an array (B, ...), the one thing that all share otherwise.

        Raises:
            AttributeError: the environment has none of that name.
        """
        return self._per_lane(getattr(self.env, attr_name), indices)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the one environment behind all lanes.

        Raises:
            ValueError: only some lanes are named.
        """
        lanes = sorted(self._get_indices(indices))
        if lanes != list(range(self.num_envs)):
            raise ValueError(f"all {self.num_envs} lanes share one environment; {attr_name!r} was set for {lanes} only")
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call a method once; an array (B, ...) is split up, anything else repeated."""
        return self._per_lane(getattr(self.env, method_name)(*method_args, **method_kwargs), indices)

    def _per_lane(self, value: Any, indices: Any) -> list[Any]:
        split = isinstance(value, (np.ndarray, torch.Tensor)) and value.shape[:1] == (self.num_envs,)
        return [value[lane] if split else value for lane in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        """No lane is wrapped."""
        return [False for _ in self._get_indices(indices)]

    # ----------------------------------------------------------------- saving

    def state_dict(self) -> dict[str, Any]:
        """Lanes, prompt order and the reward's present weights: tensors, numbers and strings only."""
        return {"lanes": self.env.state_dict(), "order": self.order.state_dict(), "reward": vars(self.reward_config)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`; raises as the environment's."""
        self.env.load_state_dict(state["lanes"])
        self.order.load_state_dict(state["order"])
        self.reward_config = RewardConfig.from_dict(state["reward"])
