"""A look at held-out prompts while training: their pictures, scores and filmstrips."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.logger import Figure

from addiff_env.agent import Agent
from addiff_env.env.prices import price_at
from addiff_env.env.reward import quality
from addiff_env.env.trajectories import filmstrip_figure, record_trajectories
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.sb3.callbacks import StatefulCallback
from addiff_env.stats import spread

HELD_OUT_SEED = 10_000  # initial noise of the first held-out episode; training draws its own


MetricFn = Callable[[np.ndarray, Sequence[str]], dict[str, float]]


class HeldOut(StatefulCallback):
    """Every so often and at the end, the most likely actions on prompts that are never trained on, as filmstrips too.

    With a range of prices each prompt is run at both of its ends and in the middle: ``price_<price>/`` are the means at
    one of them, the other numbers those over all three, and the filmstrips show the middle one.

    Args:
        lanes: an environment of its own, one lane per prompt, that waits when a lane has ended.
        prompts: one per lane.
        every: rollouts between two looks.
        filmstrips: trajectories shown as pictures in TensorBoard, of prompts from all over the list.
        metric: pictures uint8 (B, H, W, 3) and prompts to further means, e.g. the share that a checker accepts.
    """

    def __init__(
        self,
        lanes: DiffusionDenoiseVectorEnv,
        prompts: Sequence[str],
        every: int = 10,
        filmstrips: int = 4,
        metric: MetricFn | None = None,
    ) -> None:
        super().__init__()
        if len(prompts) != lanes.num_envs or every < 1:
            raise ValueError(f"{len(prompts)} held-out prompts for {lanes.num_envs} lanes, every {every} rollouts")
        self.lanes, self.prompts, self.every, self.metric = lanes, list(prompts), every, metric
        self.shown = spread(range(len(prompts)), filmstrips)
        price_range = lanes.config.price_range
        self.prices: list[float | None] = [None]
        if price_range is not None:
            self.prices = list(dict.fromkeys(price_at(price_range, (0, -1, 1)).tolist()))  # the middle one first
        self.summary: dict[str, float] = {}
        self._rollouts = 0

    def _on_rollout_end(self) -> None:
        self._rollouts += 1
        if self._rollouts % self.every == 0:
            self.look()

    def _on_training_end(self) -> None:
        """The policy that is saved is the one that is judged."""
        self.look()
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)

    @property
    def looks(self) -> int:
        """How many looks were due during the training so far."""
        return self._rollouts // self.every

    def look(self) -> dict[str, float]:
        """Run every held-out prompt once and log what came out; returns the means."""
        agent = Agent(self.model.policy.export(), {"observation": {}})
        seeds = [HELD_OUT_SEED + k for k in range(self.lanes.num_envs)]
        found: dict[float | None, dict[str, float]] = {}
        strips = []
        for price in self.prices:
            shown = [] if found else self.shown
            strips += record_trajectories(self.lanes, agent.act, self.prompts, seeds, shown, price)
            found[price] = self._means()
        self.summary = _over_prices(found)
        for name, value in self.summary.items():
            self.logger.record(f"held_out/{name}", value)
        if strips:
            titles = [self.prompts[lane] for lane in self.shown]
            figure = Figure(filmstrip_figure(list(zip(titles, strips, strict=True))), close=True)
            self.logger.record("held_out/filmstrips", figure, exclude=("stdout", "log", "json", "csv"))
        return self.summary

    def _means(self) -> dict[str, float]:
        lanes = self.lanes
        config = self.training_env.get_attr("reward_config")[0]
        values = {
            "quality": float(quality(lanes.clip_score, lanes.reward_score, config).mean()),
            "clip_score": float(lanes.clip_score.mean()),
            "reward_score": float(lanes.reward_score.mean()),
            "nfe_mean": float(lanes.nfe.mean()),
            "nfe_std": float(lanes.nfe.std()),
        }
        pictures = np.stack([lanes.final_image(lane) for lane in range(lanes.num_envs)])
        return values | (self.metric(pictures, self.prompts) if self.metric else {})

    def state_dict(self) -> dict[str, Any]:
        """When the next look is due, and what the last one showed."""
        return {"rollouts": self._rollouts, "summary": dict(self.summary)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._rollouts, self.summary = state["rollouts"], dict(state["summary"])


def _over_prices(found: Mapping[float | None, Mapping[str, float]]) -> dict[str, float]:
    """The means at each price, by names that say it, and those over all prices."""
    first = next(iter(found.values()))
    whole = {name: float(np.mean([means[name] for means in found.values()])) for name in first}
    if len(found) == 1:
        return whole
    ordered = sorted((price, means) for price, means in found.items() if price is not None)
    return whole | {f"price_{price:.6g}/{name}": value for price, means in ordered for name, value in means.items()}
