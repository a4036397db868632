"""Stable-Baselines3's view of recorded attempts: a policy learns from millions of decisions in minutes.

Paid is the checker's verdict on the picture. What was not recorded is constant, so that the policy's normalisation
leaves it out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from addiff_env.env.prices import draw_price
from addiff_env.env.reward import COLUMNS, COMPONENTS, RewardComponents, quality, step_reward
from addiff_env.env.validation import check_seed
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.sb3.vec_env import DenoiseVecEnv
from addiff_env.tiny.attempts import RecordedLanes, load_walks

SAVED = ("attempt", "at", "nfe", "price", "before")


class RecordedVecEnv(DenoiseVecEnv):
    """`DenoiseVecEnv` whose lanes follow recorded attempts.

    Args:
        env: the environment that was recorded: its settings, its spaces, its budget.
        folder: of the record.
        number: pictures of the record that are used, the first ones; None: all.
        jitter: standard deviation of what is added to the logits whenever they are seen. To the last digit they tell
            which picture it is, and a policy would learn some thousand pictures by heart.

    Raises:
        FileNotFoundError, ValueError: no record, fewer pictures than ``number``, or as `RecordedLanes`; a reward that
            pays for what was not recorded.
    """

    def __init__(
        self, env: DiffusionDenoiseVectorEnv, folder: str | Path, number: int | None = None, jitter: float = 0.0
    ) -> None:
        super().__init__(env)
        for name in ("clip_weight", "instability"):
            if value := getattr(self.reward_config, name):
                raise ValueError(f"reward.weights.{name}={value:g}: the attempts hold no pictures; set it to 0")
        walks, self.prompts = load_walks(Path(folder), env.config)
        if number is not None:
            if number > len(self.prompts):
                raise ValueError(f"attempts.number={number}, but {folder} holds {len(self.prompts)} pictures")
            walks = walks.of_prompts(np.arange(number))
        self.lanes, self.jitter = RecordedLanes(env, walks, self.num_envs), jitter
        self._rng = np.random.default_rng()

    def seed(self, seed: int | None = None) -> list[int | None]:
        """Seed the stream of attempts and prices, from the next episode on."""
        self._rng = np.random.default_rng(None if seed is None else check_seed(seed))
        return super().seed(seed)

    def reset(self) -> np.ndarray:
        """Start every lane; observations (B, width)."""
        self._begin(np.arange(self.num_envs))
        self._reset_options()
        nothing, idle = np.zeros((self.num_envs, len(COLUMNS))), np.full(self.num_envs, -1)
        self.reset_infos = self._infos(idle, nothing)
        return self._observation()

    def _begin(self, lanes: np.ndarray) -> None:
        prices, own = self.env.config.price_range, self.reward_config.efficiency
        self.lanes.begin(lanes, self._rng.choice(self.lanes.plain, len(lanes)))
        self.lanes.price[lanes] = [own if prices is None else draw_price(prices, self._rng) for _ in lanes]

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Carry out the actions; restart what ended."""
        lanes, potential, cost = self.lanes, self._potential(), self.lanes.nfe.copy()
        taken, satisfied, done = lanes.act(np.asarray(self._actions), self._rng)
        after = np.where(done, self.reward_config.reward_weight * satisfied, self._potential())
        same, paid = np.ones(self.num_envs), lanes.nfe - cost
        parts = step_reward(self.reward_config, potential, after, same, paid, done, None, lanes.price)
        rows = np.asarray(RewardComponents.stack(parts))
        infos = self._infos(taken, rows)
        observations = self._observation()
        if len(ended := np.flatnonzero(done)):
            for lane in ended.tolist():
                infos[lane]["terminal_observation"] = observations[lane]
            self._begin(ended)
            observations = self._observation()
        return observations, parts["total"].astype(np.float32), done, infos

    def action_masks(self) -> np.ndarray:
        """Which actions are admissible now: (B, 3) bool."""
        return self.lanes.action_masks()

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """As `DenoiseVecEnv.env_method`; the masks are those of the recorded lanes."""
        if method_name == "action_masks":
            return self._per_lane(self.action_masks(), indices)
        return super().env_method(method_name, *method_args, indices=indices, **method_kwargs)

    def _potential(self) -> np.ndarray:
        """Quality (B,) of what is seen."""
        return quality(np.zeros(self.num_envs), self.lanes.score, self.reward_config)

    def _observation(self) -> np.ndarray:
        return self.lanes.observation(self.jitter * self._rng.standard_normal((3, self.num_envs)))

    def _infos(self, taken: np.ndarray, parts: np.ndarray) -> list[dict[str, Any]]:
        lanes = self.lanes
        columns: dict[str, list[Any]] = {
            "prompt": self.prompts[lanes.walks.row[lanes.attempt]].tolist(),
            "price": lanes.price.tolist(),
            "nfe": lanes.nfe.tolist(),
            "step_index": lanes.at.tolist(),
            "action_taken": taken.tolist(),
            "reward_score": lanes.score.tolist(),
            "reward_components": [dict(zip(COMPONENTS, row, strict=False)) for row in parts.tolist()],
            "TimeLimit.truncated": [False] * self.num_envs,
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Where every lane stands, and the stream that new episodes are drawn from."""
        lanes = {name: torch.from_numpy(getattr(self.lanes, name).copy()) for name in SAVED}
        return {"lanes": lanes, "stream": self._rng.bit_generator.state, "reward": vars(self.reward_config)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        for name in SAVED:
            setattr(self.lanes, name, state["lanes"][name].numpy().copy())
        self._rng.bit_generator.state = state["stream"]
        self.reward_config = type(self.reward_config).from_dict(state["reward"])
