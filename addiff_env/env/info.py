"""``info`` of a step, whose texts are found by their name and passed over by iterating."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils._pytree import register_pytree_node

from addiff_env.env.config import EnvConfig
from addiff_env.env.decisions import action_masks
from addiff_env.env.reward import RewardComponents
from addiff_env.env.state import LaneState

Rewards = Mapping[str, np.ndarray]  # components and total (B,) each


class Info(dict[str, Any]):
    """A dictionary of numbers that knows some texts besides: ``info["prompt"]``, `get` and ``in`` find them.

    Iterating, ``items`` and ``len`` show the numbers alone, because Gymnasium's `NumpyToTorch`, TorchRL and whatever
    else turns all of ``info`` into tensors cannot take a string. A plain ``dict(info)`` therefore has no texts;
    `copy` and ``|`` keep them.
    """

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        self.texts: dict[str, Any] = {}

    @classmethod
    def of(cls, values: Mapping[str, Any], texts: Mapping[str, Any]) -> Info:
        """``values``, and ``texts`` besides."""
        info = cls(values)
        info.texts = dict(texts)
        return info

    def __missing__(self, name: str) -> Any:
        return self.texts[name]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.texts

    def get(self, name: str, default: Any = None) -> Any:
        """The value or text of this name, or ``default``."""
        return self[name] if name in self else default

    def copy(self) -> Info:
        """A shallow copy, with the texts."""
        return self.of(self, self.texts)

    def __or__(self, other: Any) -> Any:
        if not isinstance(other, dict):
            return NotImplemented
        return self.of({**self, **other}, self.texts | getattr(other, "texts", {}))


def step_info(
    state: LaneState, config: EnvConfig, price: np.ndarray, passes_per_nfe: int, taken: np.ndarray, reward: Rewards
) -> Info:
    """What a step that carried out ``taken`` (B,) tells of all lanes; a mask (B,) beside each value: all have it.

    ``price`` (B,) is what an evaluation costs, ``reward`` what `addiff_env.env.reward.step_reward` gives.
    """
    values: dict[str, Any] = {
        "seed": state.seed.copy(),
        "price": price,
        "step_index": state.step_index.copy(),
        "nfe": state.nfe.copy(),
        "forward_passes": state.nfe * passes_per_nfe,
        "net_flops": state.net_flops.copy(),
        "action_mask": action_masks(config, state).astype(np.int8),  # what a space's sample(mask) wants
        "action_taken": taken,
        "clip_score": state.clip_score.copy(),
        "reward_score": state.reward_score.copy(),
        "fault": state.fault.copy(),
        "reward_components": RewardComponents.stack(reward),
    }
    texts = {"prompt": np.array(state.prompt, dtype=object)}
    listed, hidden = (values | texts, {}) if config.text_info else (values, texts)
    return Info.of(_with_presence(listed, state.num_envs), _with_presence(hidden, state.num_envs))


def _with_presence(columns: dict[str, Any], num_envs: int) -> dict[str, Any]:
    return columns | {f"_{name}": np.ones(num_envs, bool) for name in columns}


def final_info(info: Info, final_obs: np.ndarray, ended: np.ndarray) -> dict[str, Any]:
    """What Gymnasium's SAME_STEP adds to the next info: the last observations and info of the lanes that ``ended``."""
    last = info.copy()
    for values in (last, last.texts):
        values.update({name: ended for name in values if name.startswith("_")})
    return {"final_obs": final_obs, "_final_obs": ended, "final_info": last, "_final_info": ended}


# TorchRL maps over ``info`` as a tree, in which torch takes only dictionaries of its own kinds apart.
register_pytree_node(
    Info,
    lambda info: (list(info.values()), list(info)),
    lambda values, names: dict(zip(names, values, strict=True)),
)
