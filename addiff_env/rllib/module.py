"""The policy as RLlib's module; importing this needs Ray."""

from __future__ import annotations

from typing import Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import nn

from addiff_env.agent import PolicyNet


class DenoiseModule(TorchRLModule, ValueFunctionAPI):
    """`PolicyNet`, and an MLP of the same shape for the value, over the same normalised observations.

    ``model_config`` holds ``parts``, ``hidden``, ``action_bias`` (where the untrained policy starts) and ``norm``,
    the calibrated state of `PartNorm`. Action masks are not part of the flat observation: in training an
    inadmissible action is played as the environment has it, and `Agent.act` takes masks when acting.
    """

    def setup(self) -> None:
        """Build both networks."""
        options = self.model_config
        hidden = options["hidden"]
        self.policy = PolicyNet(options["parts"], hidden)
        self.policy.norm.load_state_dict(options["norm"])
        nn.init.orthogonal_(self.policy.head.weight, 0.01)
        with torch.no_grad():
            self.policy.head.bias.copy_(torch.tensor([float(bias) for bias in options["action_bias"]]))
        width = sum(options["parts"].values())
        self.critic = nn.Sequential(
            nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1)
        )

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {Columns.ACTION_DIST_INPUTS: self.policy(batch[Columns.OBS])}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> torch.Tensor:
        """Values (B,) of the batch's observations (B, width)."""
        return self.critic(self.policy.norm(batch[Columns.OBS])).squeeze(-1)
