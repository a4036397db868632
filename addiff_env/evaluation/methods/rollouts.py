"""Policies run on items, and what each return would have been had it stopped earlier."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tqdm import tqdm

from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.policy_method import PolicyMethod
from addiff_env.evaluation.methods.rule_policies import (
    Policy,
    RefineAlways,
    StopAt,
    ThresholdRule,
    quality_slot,
    steps_done,
)
from addiff_env.tiny.checker import check_picture
from addiff_env.types import ACTIONS, Action

TAUS = tuple(np.arange(-3.0, 4.25, 0.25).tolist())  # reward-model scores; a logit of 4 is a success at 98%


@dataclass(frozen=True)
class Episode:
    """What a policy made of one item."""

    value: float  # return: all rewards, summed
    success: float  # 0 or 1, by the exact checker
    nfe: int
    actions: tuple[int, ...]  # as carried out


@dataclass(frozen=True)
class StopOutcome:
    """How an episode ends if it is stopped at a look; ``score`` is what the policy sees there."""

    score: float  # the reward model's; infinite at the end that leaves nothing to decide
    episode: Episode


@dataclass(frozen=True)
class PolicyRun:
    """One policy's episodes, in the items' order."""

    name: str
    episodes: Sequence[Episode]

    @cached_property
    def values(self) -> np.ndarray:
        """Returns (N,)."""
        return np.array([episode.value for episode in self.episodes])

    @property
    def success(self) -> float:
        """Share of pictures that the checker accepts."""
        return float(np.mean([episode.success for episode in self.episodes]))

    @property
    def nfe(self) -> np.ndarray:
        """Denoiser evaluations (N,)."""
        return np.array([episode.nfe for episode in self.episodes])

    @property
    def shares(self) -> np.ndarray:
        """Shares (3,) of continue, stop and refine among all decisions."""
        taken = np.concatenate([episode.actions for episode in self.episodes])
        return np.bincount(taken, minlength=len(ACTIONS)) / len(taken)


def run_policy(
    env: DiffusionDenoiseVectorEnv, policy: Policy, items: Sequence[Item], name: str, price: float | None = None
) -> PolicyRun:
    """Run ``policy`` once on every item, at a ``price`` of an evaluation (None: the environment's)."""
    method, episodes = PolicyMethod(env, policy, name, price), {}
    for group in _counted(method.make(list(items)), len(items), name):
        for item, made in group:
            success = float(check_picture(made.picture, item.prompt).satisfied)
            episodes[item] = Episode(made.reward, success, made.nfe, tuple(made.actions))
    return PolicyRun(name, [episodes[item] for item in items])


def stop_outcomes(
    env: DiffusionDenoiseVectorEnv,
    policy: Policy,
    look_at: int,
    items: Sequence[Item],
    name: str,
    price: float | None = None,
) -> list[list[StopOutcome]]:
    """Follow ``policy``, and from ``look_at`` steps on see at every decision how stopping there would end.

    One that always continues tells what stopping after k steps is worth for every k; one that refines while the
    score is under tau tells it for every smaller tau too. The last outcome of each item is the policy's own.
    """
    size = env.num_envs
    batches = (_stop_outcomes(env, policy, look_at, items[at : at + size], price) for at in range(0, len(items), size))
    return [found for batch in _counted(batches, len(items), name) for found in batch]


def _stop_outcomes(
    env: DiffusionDenoiseVectorEnv, policy: Policy, look_at: int, items: Sequence[Item], price: float | None
) -> list[list[StopOutcome]]:
    rollouts = [Rollout(item) for item in items]
    mask = np.arange(env.num_envs) < len(items)
    options = {"prompt": [item.prompt for item in items], "seed": [item.seed for item in items]}
    observation, info = env.reset(options=options | {"price": price, "reset_mask": mask})
    env.park(~mask)  # lanes without an item wait
    while (running := ~env.done).any():
        actions = policy.act(observation, info["action_mask"])
        seen = quality_slot(observation, "reward_score")
        looking = running & (steps_done(observation, env.config.num_inference_steps) >= look_at)
        could_stop = info["action_mask"][:, Action.STOP].astype(bool) & (actions != Action.STOP)
        _try_stops(env, rollouts, np.flatnonzero(looking & could_stop), seen)
        observation, reward, _, _, info = env.step(actions)
        for lane in np.flatnonzero(running).tolist():
            rollouts[lane].step(lane, reward, info)
            if env.done[lane]:
                rollouts[lane].note(math.inf, env, lane)
    return [rollout.found for rollout in rollouts]


def _try_stops(env: DiffusionDenoiseVectorEnv, rollouts: list[Rollout], lanes: np.ndarray, seen: np.ndarray) -> None:
    """Note how stopping ``lanes`` now would end, and put everything back."""
    if len(lanes) == 0:
        return
    state = env.state_dict()
    env.park(np.setdiff1d(np.arange(env.num_envs), lanes))  # the others wait
    _, reward, _, _, info = env.step(np.full(env.num_envs, int(Action.STOP)))
    for lane in lanes.tolist():
        rollouts[lane].branch(lane, reward, info).note(float(seen[lane]), env, lane)
    env.load_state_dict(state)


class Rollout:
    """One item's episode so far, and the outcomes found along it."""

    def __init__(self, item: Item, value: float = 0.0, actions: Sequence[int] = ()) -> None:
        self.item, self.value, self.actions = item, value, list(actions)
        self.found: list[StopOutcome] = []

    def step(self, lane: int, reward: np.ndarray, info: dict[str, Any]) -> None:
        """Add what the lane did and got."""
        self.value += float(reward[lane])
        if info["action_taken"][lane] >= 0:  # else it broke down in its warm-up
            self.actions.append(int(info["action_taken"][lane]))

    def branch(self, lane: int, reward: np.ndarray, info: dict[str, Any]) -> Rollout:
        """This episode with another last step; what is found there is kept here."""
        other = Rollout(self.item, self.value, self.actions)
        other.found = self.found
        other.step(lane, reward, info)
        return other

    def note(self, score: float, env: DiffusionDenoiseVectorEnv, lane: int) -> None:
        """The lane has ended."""
        success = float(check_picture(env.final_image(lane), self.item.prompt).satisfied)
        episode = Episode(self.value, success, int(env.nfe[lane]), tuple(self.actions))
        self.found.append(StopOutcome(score, episode))


def _counted(groups: Iterable[list[Any]], total: int, name: str) -> Iterator[list[Any]]:
    with tqdm(total=total, desc=name, unit="image", file=sys.stderr, leave=False) as bar:
        for group in groups:
            bar.update(len(group))
            yield group


@dataclass(frozen=True)
class RuleChoice:
    """The threshold rule with the highest mean return on training prompts."""

    look_at: int
    tau: float
    value: float  # that return
    prompts: int  # how many it is the mean of
    rules: int  # how many were compared


def choose_rule(
    env: DiffusionDenoiseVectorEnv, items: Sequence[Item], taus: Sequence[float] = TAUS, price: float | None = None
) -> RuleChoice:
    """Try every n and every tau on ``items``, at one ``price``; of equal ones the first counts."""
    steps, first = env.config.num_inference_steps, max(1, env.config.warmup_steps)
    table: dict[tuple[int, float], float] = {}
    for look_at in range(first, steps):
        policy = ThresholdRule(look_at, max(taus), steps)
        found = stop_outcomes(env, policy, look_at, items, f"looking after {look_at} steps", price)
        table |= {(look_at, tau): _mean_return(found, tau) for tau in taus}
    (look_at, tau), value = max(table.items(), key=lambda entry: entry[1])
    return RuleChoice(look_at, tau, value, len(items), len(table))


def _mean_return(found: Sequence[Sequence[StopOutcome]], tau: float) -> float:
    """Of a rule that stops at the first score of at least ``tau``."""
    return float(np.mean([next(one.episode.value for one in own if one.score >= tau) for own in found]))


def constants(env: DiffusionDenoiseVectorEnv, items: Sequence[Item], price: float | None = None) -> list[PolicyRun]:
    """Stop after k steps for every k, always continue, refine always."""
    steps = env.config.num_inference_steps
    found = stop_outcomes(env, StopAt(steps, steps), 0, items, "stop-k", price)
    numbers = range(max(1, env.config.warmup_steps), steps)
    stops = [PolicyRun(f"stop-{k}", [_after(own, k - numbers.start) for own in found]) for k in numbers]
    continued = PolicyRun("always-continue", [own[-1].episode for own in found])
    return [*stops, continued, run_policy(env, RefineAlways(), items, "refine-always", price)]


def _after(found: Sequence[StopOutcome], decisions: int) -> Episode:
    """Stopped after so many decisions; a lane that ended before (its numbers were not finite) keeps its own end."""
    return found[min(decisions, len(found) - 1)].episode
