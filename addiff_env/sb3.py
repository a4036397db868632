"""The Stable-Baselines3 side: a VecEnv adapter, the custom MLP policy, callbacks. Only here is SB3 imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv

from addiff_env.agent import PartNorm, PolicyNet
from addiff_env.env import DiffusionDenoiseVectorEnv
from addiff_env.perception import QUALITY, TIMESTEP_WIDTH
from addiff_env.reward import COMPONENTS
from addiff_env.types import ACTIONS

_SCALARS = ("nfe", "net_flops", "step_index", "action_taken", "clip_score", "reward_score")


def make_vec_env(env_id: str, num_envs: int, **kwargs: Any) -> DenoiseVecEnv:
    """Make a registered id as an SB3 `VecEnv` of ``num_envs`` lanes."""
    envs = gym.make_vec(env_id, num_envs=num_envs, autoreset_mode=AutoresetMode.SAME_STEP, **kwargs)
    unwrapped = envs.unwrapped
    assert isinstance(unwrapped, DiffusionDenoiseVectorEnv)
    return DenoiseVecEnv(unwrapped)


def observation_parts(env: DiffusionDenoiseVectorEnv) -> dict[str, int]:
    """Widths of the flat observation's parts, in order."""
    clip = env.perception.clip.width
    return {"clip_image": clip, "clip_text": clip, "timestep": TIMESTEP_WIDTH, "quality": len(QUALITY)}


class DenoiseVecEnv(VecEnv):
    """`DiffusionDenoiseVectorEnv` as Stable-Baselines3 expects it; lanes restart in the step that ends them.

    Raises:
        ValueError: the environment does not restart lanes in the same step.
    """

    def __init__(self, env: DiffusionDenoiseVectorEnv) -> None:
        if env.autoreset_mode != AutoresetMode.SAME_STEP:
            raise ValueError(f"SB3 needs autoreset_mode SAME_STEP, got {env.autoreset_mode}")
        self.env = env
        self._reset_seed: int | None = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def seed(self, seed: int | None = None) -> list[int | None]:
        """Seed the next reset."""
        self._reset_seed = seed
        return [seed] * self.num_envs

    def reset(self) -> np.ndarray:
        """Start every lane; observations (B, width)."""
        observations, info = self.env.reset(seed=self._reset_seed)
        self._reset_seed = None
        self.reset_infos = [self._lane_info(info, lane) for lane in range(self.num_envs)]
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        """Remember the actions."""
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Carry them out."""
        observations, rewards, terminated, truncated, info = self.env.step(self._actions)
        infos = [self._lane_info(info, lane) for lane in range(self.num_envs)]
        for lane in map(int, np.flatnonzero(terminated)):
            infos[lane] = self._lane_info(info["final_info"], lane)
            infos[lane]["terminal_observation"] = info["final_obs"][lane]
            infos[lane]["TimeLimit.truncated"] = False
        return observations, rewards.astype(np.float32), terminated | truncated, infos

    @staticmethod
    def _lane_info(info: dict[str, Any], lane: int) -> dict[str, Any]:
        scalars = {name: info[name][lane].item() for name in _SCALARS}
        parts = {name: float(info["reward"][name][lane]) for name in COMPONENTS}
        return scalars | {"prompt": info["prompt"][lane], "action_mask": info["action_mask"][lane], "reward": parts}

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute, once per asked lane."""
        return [getattr(self.env, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the one environment behind all lanes."""
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call a method once; a result per lane is split up, anything else repeated."""
        lanes = list(self._get_indices(indices))
        result = getattr(self.env, method_name)(*method_args, **method_kwargs)
        per_lane = isinstance(result, (np.ndarray, Sequence)) and len(result) == self.num_envs
        return [result[lane] if per_lane else result for lane in lanes]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        """No lane is wrapped."""
        return [False] * len(list(self._get_indices(indices)))


class PartNormExtractor(BaseFeaturesExtractor):
    """`PartNorm` as SB3's features extractor."""

    def __init__(self, observation_space: gym.spaces.Box, parts: dict[str, int]) -> None:
        super().__init__(observation_space, features_dim=sum(parts.values()))
        self.norm = PartNorm(parts)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Normalise (B, width)."""
        return self.norm(observations)


class DenoisePolicy(ActorCriticPolicy):
    """Two-layer MLPs for policy and value over part-wise normalised observations.

    ``action_bias`` (3 logits) is where the untrained policy starts: one that mostly continues sees
    whole trajectories, a uniform one stops two pictures in three before they show anything.
    """

    def __init__(
        self, *args: Any, parts: dict[str, int], hidden: int = 128, action_bias: Sequence[float] = (0, 0, 0), **kw: Any
    ) -> None:
        self.hidden = hidden
        kw |= {
            "net_arch": {"pi": [hidden, hidden], "vf": [hidden, hidden]},
            "activation_fn": torch.nn.Tanh,
            "features_extractor_class": PartNormExtractor,
            "features_extractor_kwargs": {"parts": parts},
        }
        super().__init__(*args, **kw)
        with torch.no_grad():
            self.action_net.bias.copy_(torch.tensor([float(b) for b in action_bias]))

    def export(self) -> PolicyNet:
        """The actor alone, as `addiff_env.agent` saves it."""
        norm = self.features_extractor.norm
        net = PolicyNet(norm.parts, self.hidden)
        net.norm.load_state_dict(norm.state_dict())
        net.body.load_state_dict(self.mlp_extractor.policy_net.state_dict())
        net.head.load_state_dict(self.action_net.state_dict())
        return net.cpu()


def calibrate(model: PPO, steps: int, probabilities: Sequence[float], seed: int) -> None:
    """Fix the observation statistics from ``steps`` steps of a random policy with these action shares."""
    env = model.get_env()
    assert env is not None
    rng = np.random.default_rng(seed)
    env.seed(seed)
    observations = [np.asarray(env.reset())]
    for _ in range(steps):
        actions = rng.choice(len(ACTIONS), size=env.num_envs, p=probabilities)
        observations.append(np.asarray(env.step(actions)[0]))
    seen = torch.as_tensor(np.concatenate(observations))
    model.policy.features_extractor.norm.set_statistics(seen.mean(0), seen.std(0))
    model._last_obs = None  # so that learn() resets


class EpisodeLog(BaseCallback):
    """TensorBoard keys of this project: NFE, action shares, reward components; and the latest means as ``summary``."""

    def __init__(self) -> None:
        super().__init__()
        self.summary: dict[str, float] = {}
        self._clear()

    def _clear(self) -> None:
        self._actions = np.zeros(len(ACTIONS))
        self._rewards: dict[str, list[float]] = {name: [] for name in COMPONENTS}
        self._episodes: list[dict[str, float]] = []

    def _on_step(self) -> bool:
        for info, done in zip(self.locals["infos"], self.locals["dones"], strict=True):
            self._actions[info["action_taken"]] += 1
            for name in COMPONENTS:
                self._rewards[name].append(info["reward"][name])
            if done:
                self._episodes.append({"nfe": info["nfe"], "final_reward_score": info["reward_score"]})
        return True

    def _on_rollout_end(self) -> None:
        shares = self._actions / self._actions.sum()
        values = {f"action/{name}": float(share) for name, share in zip(ACTIONS, shares, strict=True)}
        values |= {f"reward/{name}": float(np.mean(items)) for name, items in self._rewards.items()}
        if self._episodes:
            nfe = np.array([episode["nfe"] for episode in self._episodes])
            final = np.array([episode["final_reward_score"] for episode in self._episodes])
            values |= {"episode/nfe_mean": float(nfe.mean()), "episode/nfe_std": float(nfe.std())}
            values |= {"episode/final_reward_score": float(final.mean()), "episode/count": float(len(nfe))}
        for name, value in values.items():
            self.logger.record(name, value)
        self.summary |= values
        self._clear()
