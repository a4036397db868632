"""The custom MLP policy, plain and with action masks, and what fixes its input normalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import torch
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from addiff_env.agent import PartNorm, PolicyNet


class PartNormExtractor(BaseFeaturesExtractor):
    """`PartNorm` as SB3's features extractor."""

    def __init__(self, observation_space: gym.spaces.Box, parts: dict[str, int]) -> None:
        super().__init__(observation_space, features_dim=sum(parts.values()))
        self.norm = PartNorm(parts)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Normalise (B, width)."""
        return self.norm(observations)


class _TwoLayerMLP:
    """What both policies share; put before an SB3 policy among the bases."""

    def __init__(
        self,
        *args: Any,
        parts: dict[str, int],
        hidden: int = 128,
        action_bias: Sequence[float] = (0, 0, 0),
        gains: Mapping[str, float] | None = None,
        **kw: Any,
    ) -> None:
        self.hidden, self.gains = hidden, dict(gains or {})
        kw |= {
            "net_arch": {"pi": [hidden, hidden], "vf": [hidden, hidden]},
            "activation_fn": torch.nn.Tanh,
            "features_extractor_class": PartNormExtractor,
            "features_extractor_kwargs": {"parts": parts},
        }
        super().__init__(*args, **kw)
        with torch.no_grad():
            self.action_net.bias.copy_(torch.tensor([float(b) for b in action_bias]))  # type: ignore[attr-defined]

    def export(self: Any) -> PolicyNet:
        """The actor alone, as `addiff_env.agent` saves it."""
        norm = self.features_extractor.norm
        with torch.random.fork_rng(devices=[]):  # whoever exports in the middle of a training must not change it
            net = PolicyNet(norm.parts, self.hidden)
        net.norm.load_state_dict(norm.state_dict())
        net.body.load_state_dict(self.mlp_extractor.policy_net.state_dict())
        net.head.load_state_dict(self.action_net.state_dict())
        return net.cpu()

    def take(self: Any, net: PolicyNet) -> None:
        """The reverse of `export`: act as ``net`` does; the value network stays as it is."""
        self.features_extractor.norm.load_state_dict(net.norm.state_dict())
        self.mlp_extractor.policy_net.load_state_dict(net.body.state_dict())
        self.action_net.load_state_dict(net.head.state_dict())


class DenoisePolicy(_TwoLayerMLP, ActorCriticPolicy):
    """Two-layer MLPs for policy and value over part-wise normalised observations.

    ``action_bias`` (3 logits) is where the untrained policy starts: one that mostly continues sees
    whole trajectories, a uniform one stops two pictures in three before they show anything. ``gains`` say which parts
    of the observation weigh more in the first layer than the others do (`PartNorm.set_statistics`).
    """


class MaskableDenoisePolicy(_TwoLayerMLP, MaskableActorCriticPolicy):
    """`DenoisePolicy` that never takes an inadmissible action (Huang & Ontanon 2022), for `MaskablePPO`."""


ALGORITHMS: dict[str, tuple[type[Any], type[Any]]] = {
    "ppo": (PPO, DenoisePolicy),
    "maskable_ppo": (MaskablePPO, MaskableDenoisePolicy),
}


def calibrate(model: Any, steps: int, probabilities: Sequence[float], seed: int) -> None:
    """Fix the observation statistics from ``steps`` steps of a random policy with these action shares.

    Raises:
        ValueError: the policy's gains name parts that the observation does not have.
    """
    env = model.get_env()
    assert env is not None
    env.seed(seed)
    norm, gains = model.policy.features_extractor.norm, model.policy.gains
    norm.calibrate(env.reset, lambda actions: env.step(actions)[0], steps, probabilities, seed, gains)
    model._last_obs = None  # so that learn() resets
