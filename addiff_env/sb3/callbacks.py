"""What runs beside training: logs, schedules, the reward's moving parts, the collapse alarm, held-out episodes.

All of them act between rollouts. Those with a memory have `state_dict` and `load_state_dict`, so that a resumed run
goes on as if nothing had happened (see `addiff_env.sb3.checkpoint`).
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from addiff_env.env.config import EnvConfig
from addiff_env.env.prices import position
from addiff_env.env.reward import COMPONENTS, DualVariable, RunningScores
from addiff_env.sb3.episodes import COMPLEXITIES, complexity_group
from addiff_env.sb3.vec_env import DenoiseVecEnv
from addiff_env.types import ACTIONS


class CollapseWarning(UserWarning):
    """The policy does the same thing everywhere."""


def _count(actions: Any, taken: int) -> None:
    """Count an action carried out; -1 stands for none, in a lane that did not act in this step."""
    if taken >= 0:
        actions[taken] += 1


class StatefulCallback(BaseCallback):
    """A callback with a memory, which checkpoints carry: tensors, numbers and strings only."""

    def _on_step(self) -> bool:
        return True

    def state_dict(self) -> dict[str, Any]:
        """The memory."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        raise NotImplementedError


class Clock(StatefulCallback):
    """Seconds spent training, over all processes that had a part in it."""

    def __init__(self) -> None:
        super().__init__()
        self._before = 0.0
        self._began: float | None = None  # it stands still before and after the training

    @property
    def seconds(self) -> float:
        """So far."""
        return self._before + (0.0 if self._began is None else time.monotonic() - self._began)

    def _on_training_start(self) -> None:
        self._began = time.monotonic()

    def _on_training_end(self) -> None:
        self._before, self._began = self.seconds, None

    def state_dict(self) -> dict[str, Any]:
        """The time so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._before, self._began = state["seconds"], None


THIRDS = ("low", "middle", "high")  # of a range of prices, by the logarithm


def third_of(price_range: Sequence[float], price: float) -> str:
    """Which of `THIRDS` a price is in."""
    where = (float(position(price_range, price)) + 1) / 2
    return THIRDS[min(len(THIRDS) - 1, int(where * len(THIRDS)))]


class EpisodeLog(StatefulCallback):
    """TensorBoard keys of this project, and the latest means as ``summary``.

    ``action/`` shares and ``reward/`` components are means over the rollout's decisions (``rollout/ep_rew_mean`` is
    SB3's mean return of an episode); ``episode/``, ``nfe_by_complexity/`` and ``nfe_by_price/`` (by thirds of a range
    of prices) are means over the episodes that ended.
    """

    def __init__(self, price_range: Sequence[float] | None = None) -> None:
        super().__init__()
        self.price_range = price_range
        self.summary: dict[str, float] = {}
        self._clear()

    def _clear(self) -> None:
        self._actions = np.zeros(len(ACTIONS))
        self._rewards: dict[str, list[float]] = {name: [] for name in COMPONENTS}
        self._nfe: list[float] = []
        self._scores: list[float] = []
        self._nfe_of: dict[str, list[float]] = {f"complexity/{group}": [] for group in COMPLEXITIES}
        self._nfe_of |= {f"price/{third}": [] for third in THIRDS}

    def _on_step(self) -> bool:
        for info, done in zip(self.locals["infos"], self.locals["dones"], strict=True):
            _count(self._actions, info["action_taken"])
            for name in COMPONENTS:
                self._rewards[name].append(info["reward_components"][name])
            if done:
                self._nfe.append(info["nfe"])
                self._scores.append(info["reward_score"])
                self._nfe_of[f"complexity/{complexity_group(info['prompt'])}"].append(info["nfe"])
                if self.price_range is not None:
                    self._nfe_of[f"price/{third_of(self.price_range, info['price'])}"].append(info["nfe"])
        return True

    def _on_rollout_end(self) -> None:
        values = self._step_values() | (self._episode_values() if self._nfe else {})
        for name, value in values.items():
            self.logger.record(name, value)
        self.summary |= values
        self._clear()

    def _step_values(self) -> dict[str, float]:
        shares = self._actions / max(1, self._actions.sum())
        values = {f"action/{name}": float(share) for name, share in zip(ACTIONS, shares, strict=True)}
        return values | {f"reward/{name}": float(np.mean(items)) for name, items in self._rewards.items()}

    def _episode_values(self) -> dict[str, float]:
        values = {
            "episode/nfe_mean": float(np.mean(self._nfe)),
            "episode/nfe_std": float(np.std(self._nfe)),
            "episode/final_reward_score": float(np.mean(self._scores)),
            "episode/count": float(len(self._nfe)),
        }
        groups = {name: items for name, items in self._nfe_of.items() if items}
        return values | {f"nfe_by_{name}": float(np.mean(items)) for name, items in groups.items()}

    def state_dict(self) -> dict[str, Any]:
        """The latest means; everything else starts anew with each rollout."""
        return {"summary": dict(self.summary)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.summary = dict(state["summary"])


class LinearSchedule:
    """From ``start`` to ``end`` over the training; called with the share of it that remains, as SB3 does.

    That share ends below 0 where the last rollout goes beyond the timesteps asked for; the value stays at ``end``.

    Args:
        start, end: the values.
        lag: share of the training to look back. SB3 asks after a rollout, so that the last update would have ``end``;
            with one rollout's share the first update has ``start``, and a rate that goes to 0 is not 0 yet in the last.
    """

    def __init__(self, start: float, end: float, lag: float = 0.0) -> None:
        self.start, self.end, self.lag = float(start), float(end), float(lag)

    def __call__(self, progress_remaining: float) -> float:
        """The value at this point."""
        return self.end + (self.start - self.end) * min(1.0, max(0.0, progress_remaining + self.lag))


class Progress(BaseCallback):
    """Tell the prompt order how far training is; set entropy bonus and GAE's lambda. All from the timesteps alone."""

    def __init__(
        self, env: DenoiseVecEnv, total_timesteps: int, entropy: LinearSchedule, gae_lambda: LinearSchedule
    ) -> None:
        super().__init__()
        self.env, self.total, self.entropy, self.gae_lambda = env, total_timesteps, entropy, gae_lambda

    def _on_rollout_start(self) -> None:
        done = self.model.num_timesteps / self.total
        self.env.order.progress = done
        model: Any = self.model
        model.ent_coef = self.entropy(1 - done)
        model.gae_lambda = model.rollout_buffer.gae_lambda = self.gae_lambda(1 - done)  # the buffer's is the one in use

    def _on_rollout_end(self) -> None:
        self.logger.record("train/ent_coef", self.model.ent_coef)  # type: ignore[attr-defined]
        self.logger.record("train/gae_lambda", self.model.gae_lambda)  # type: ignore[attr-defined]
        if len(self.env.order.stages) > 1:
            self.logger.record("curriculum/stage", self.env.order.stage)

    def _on_step(self) -> bool:
        return True


class RunningNormalisation(StatefulCallback):
    """Learn the scales of the scores from the training's own pictures; see `addiff_env.env.reward.RunningScores`."""

    def __init__(self, env: DenoiseVecEnv) -> None:
        super().__init__()
        self.env, self.scores = env, RunningScores()

    def _on_step(self) -> bool:
        infos = self.locals["infos"]
        self.scores.update(*(np.array([info[name] for info in infos]) for name in ("clip_score", "reward_score")))
        return True

    def _on_rollout_end(self) -> None:
        config = self.env.reward_config = self.scores.apply(self.env.reward_config)
        for name in ("clip_mean", "clip_std", "reward_mean", "reward_std"):
            self.logger.record(f"normalisation/{name}", getattr(config, name))

    def state_dict(self) -> dict[str, Any]:
        """What was learned."""
        return self.scores.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.scores.load_state_dict(state)


def reachable_nfe(config: EnvConfig) -> tuple[int, int]:
    """The fewest and the most evaluations that an episode can take: stopped after the warm-up, or the budget."""
    return config.warmup_steps + config.finish_steps, config.nfe_budget


class TargetNFE(StatefulCallback):
    """Let a dual variable set the price of an evaluation until episodes take ``target_nfe`` on average.

    The episodes are training's own, whose actions are drawn from the policy; the most likely actions, which an
    evaluation takes, may need more or fewer.

    Raises:
        ValueError: no positive price to start from, a mean that no policy can have, or a range of prices.
    """

    def __init__(self, env: DenoiseVecEnv, target_nfe: float, rate: float) -> None:
        super().__init__()
        if env.env.config.price_range is not None:
            raise ValueError(
                f"reward.target_nfe={target_nfe:g} searches one price, price_range {list(env.env.config.price_range)} "
                "draws one an episode: set one of them"
            )
        least, most = reachable_nfe(env.env.config)
        if not least <= target_nfe <= most:
            raise ValueError(
                f"reward.target_nfe must lie between {least} (an early stop) and {most} (the budget), got {target_nfe}"
            )
        self.env = env
        self.dual = DualVariable(target_nfe, env.reward_config.efficiency, rate)
        self._nfe: list[int] = []

    def _on_step(self) -> bool:
        ended = zip(self.locals["infos"], self.locals["dones"], strict=True)
        self._nfe += [info["nfe"] for info, done in ended if done]
        return True

    def _on_rollout_end(self) -> None:
        if self._nfe:
            self.dual.update(float(np.mean(self._nfe)))
            self.env.reward_config = replace(self.env.reward_config, efficiency=self.dual.value)
            self._warn_at_a_bound(float(np.mean(self._nfe)))
        self._nfe = []
        self.logger.record("dual/price", self.dual.value)

    def _warn_at_a_bound(self, mean_nfe: float) -> None:
        """Say where the price can move no further: the target is out of its reach."""
        if self.dual.at_bound:
            warnings.warn(
                f"the price of an evaluation has come to its bound, {self.dual.value:g}, with episodes of "
                f"{mean_nfe:.1f} evaluations instead of {self.dual.target_nfe:g}: name another reward.target_nfe",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """The price."""
        return {"value": self.dual.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.dual.value = state["value"]


class CollapseAlarm(StatefulCallback):
    """Warn when over the last ``window`` rollouts one action had more than ``share``, or NFE did not vary at all.

    Args:
        window: rollouts looked at together.
        share: of one action among all decisions, in (0, 1).
        stop: end the training then; ``collapsed`` tells.
    """

    def __init__(self, window: int = 5, share: float = 0.98, stop: bool = False) -> None:
        super().__init__()
        if window < 1 or not 0 < share < 1:
            raise ValueError(f"the alarm needs window >= 1 and share in (0, 1), got {window} and {share}")
        self.share, self.stop = share, stop
        self.collapsed: str | None = None  # why, in words
        self._rollouts: deque[dict[str, list[int]]] = deque(maxlen=window)
        self._clear()

    def _clear(self) -> None:
        self._actions, self._nfe = [0] * len(ACTIONS), list[int]()

    def _on_step(self) -> bool:
        for info, done in zip(self.locals["infos"], self.locals["dones"], strict=True):
            _count(self._actions, info["action_taken"])
            if done:
                self._nfe.append(int(info["nfe"]))
        return not (self.stop and self.collapsed)

    def _on_rollout_end(self) -> None:
        nfe = sorted(self._nfe)
        # Two ended episodes and both ends are all that the verdict asks for: a checkpoint carries no more.
        self._rollouts.append({"actions": list(self._actions), "nfe": [nfe[0], nfe[-1]] if len(nfe) > 1 else nfe})
        self._clear()
        self.collapsed = self._verdict() if len(self._rollouts) == self._rollouts.maxlen else None
        self.logger.record("collapse/alarm", float(self.collapsed is not None))
        if self.collapsed:
            self._shout(self.collapsed)

    def _verdict(self) -> str | None:
        actions = np.sum([rollout["actions"] for rollout in self._rollouts], axis=0)
        shares = actions / max(1, actions.sum())
        ended = [nfe for rollout in self._rollouts for nfe in rollout["nfe"]]
        if shares.max() > self.share:
            return f"{shares.max():.1%} of the last {actions.sum()} decisions were {ACTIONS[int(shares.argmax())]!r}"
        if len(ended) > 1 and len(set(ended)) == 1:  # a single episode has nothing to differ from
            return f"every episode of the last {len(self._rollouts)} rollouts took {ended[0]} evaluations"
        return None

    def _shout(self, verdict: str) -> None:
        what = "stopping" if self.stop else "raise algorithm.ent_coef, or look at the reward's weights"
        text, line = f"the policy has collapsed: {verdict}; {what}", inspect.currentframe().f_lineno  # type: ignore[union-attr]
        # Without a registry to remember it: Python shows the same words from the same place only once, but the alarm
        # goes on for as long as the policy stays collapsed.
        warnings.warn_explicit(text, CollapseWarning, __file__, line, __name__, registry=None)

    def state_dict(self) -> dict[str, Any]:
        """The rollouts looked at, and the verdict."""
        return {"rollouts": [dict(rollout) for rollout in self._rollouts], "collapsed": self.collapsed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._rollouts.extend(state["rollouts"])
        self.collapsed = state["collapsed"]
