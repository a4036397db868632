"""Hand-made policies: what a learned one has to beat. Each acts on flat observations, as an agent does.

The environment shows every policy everything at every decision, and charges for it. A rule that would do without is not
made to pay: it says by ``sees`` at which observations it looks, and of what it looks at it reads the reward model's
score only; `AdaptivePipeline` takes the rest off its cost. An agent has no ``sees``: it reads everything.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy import special

from addiff_env.perception.features import QUALITY
from addiff_env.types import Action, Generated


class Policy(Protocol):
    """Whatever decides; `addiff_env.agent.Agent` is one."""

    @property
    def flops(self) -> float:
        """Floating-point operations of one decision."""

    @property
    def fingerprint(self) -> str:
        """What tells two policies apart in result rows."""

    def act(self, obs: Any, action_mask: Any = None) -> np.ndarray:
        """Actions (B,) int64 for flat observations (B, width) and admissible actions (B, 3) bool."""


class Blind:
    """A policy that reads no observation."""

    def sees(self, obs: Any) -> np.ndarray:
        """Whether it looks, (B,) bool: never."""
        return np.zeros(len(obs), bool)


def quality_slot(obs: Any, name: str) -> np.ndarray:
    """One of the `QUALITY` numbers (B,) float64 of flat observations (B, width), whose last slots they are."""
    return np.asarray(obs, dtype=np.float64)[:, QUALITY.index(name) - len(QUALITY)]


def steps_done(obs: Any, num_inference_steps: int) -> np.ndarray:
    """Solver steps done (B,) int, from the observation's ratio."""
    return np.rint(quality_slot(obs, "step_ratio") * num_inference_steps).astype(int)


@dataclass(frozen=True)
class ThresholdRule:
    """Run ``look_at`` steps, look; refine while the verifier's score is under ``tau``, else stop (DESIGN's baseline).

    A refinement that is not admissible (budget, cap) is a stop. ``num_inference_steps`` is the environment's.
    """

    look_at: int
    tau: float
    num_inference_steps: int
    flops: float = 0.0  # a comparison

    @property
    def fingerprint(self) -> str:
        """The rule's numbers."""
        return f"threshold-{self.look_at}-{self.tau:g}"

    def sees(self, obs: Any) -> np.ndarray:
        """Whether it looks, (B,) bool: not before ``look_at`` steps."""
        return steps_done(obs, self.num_inference_steps) >= self.look_at

    def act(self, obs: Any, action_mask: Any = None) -> np.ndarray:
        """Actions (B,) int64."""
        looking = self.sees(obs)
        bad = quality_slot(obs, "reward_score") < self.tau
        if action_mask is not None:
            bad = bad & np.asarray(action_mask)[:, Action.REFINE]
        end = np.where(bad, Action.REFINE, Action.STOP)
        return np.where(looking, end, Action.CONTINUE).astype(np.int64)


@dataclass(frozen=True)
class TwoStepRule:
    """Refine early where a picture looks doomed, later where it looks bad, and stop where it is good enough.

    At every decision: refine while the verifier's chance of a satisfying end, if the lane goes on, is under ``early``
    before ``turn`` steps and under ``late`` from then on; else stop where its chance if the lane stops is above
    ``enough``; else go on. Chances lie in [0, 1], ``enough`` above 1 never stops. A refinement that is not admissible
    goes on instead. For scorers of latents, which foretell (`addiff_env.perception.scorers`).
    """

    early: float
    turn: int
    late: float
    enough: float
    num_inference_steps: int
    outlook: int  # where the score of going on stands in a flat observation
    flops: float = 0.0  # comparisons

    @property
    def fingerprint(self) -> str:
        """The rule's numbers."""
        return f"two-step-{self.early:g}-{self.turn}-{self.late:g}-{self.enough:g}"

    def sees(self, obs: Any) -> np.ndarray:
        """Whether it looks, (B,) bool: always."""
        return np.ones(len(obs), bool)

    def act(self, obs: Any, action_mask: Any = None) -> np.ndarray:
        """Actions (B,) int64."""
        turned = steps_done(obs, self.num_inference_steps) >= self.turn
        going_on = special.expit(np.asarray(obs, dtype=np.float64)[:, self.outlook])
        bad = going_on < np.where(turned, self.late, self.early)
        good = special.expit(quality_slot(obs, "reward_score")) > self.enough
        wanted = np.where(bad, Action.REFINE, np.where(good, Action.STOP, Action.CONTINUE)).astype(np.int64)
        if action_mask is None:
            return wanted
        refused = bad & ~np.asarray(action_mask)[:, Action.REFINE].astype(bool)
        return np.where(refused, int(Action.CONTINUE), wanted)


@dataclass(frozen=True)
class StopAt(Blind):
    """Stop after ``steps`` solver steps."""

    steps: int
    num_inference_steps: int
    flops: float = 0.0

    @property
    def fingerprint(self) -> str:
        """The number of steps."""
        return f"stop-{self.steps}"

    def act(self, obs: Any, action_mask: Any = None) -> np.ndarray:
        """Actions (B,) int64."""
        done = steps_done(obs, self.num_inference_steps) >= self.steps
        return np.where(done, Action.STOP, Action.CONTINUE).astype(np.int64)


@dataclass(frozen=True)
class RefineAlways(Blind):
    """Refine whenever it is admissible, else continue."""

    flops: float = 0.0
    fingerprint: str = "refine-always"

    def act(self, obs: Any, action_mask: Any = None) -> np.ndarray:
        """Actions (B,) int64."""
        allowed = np.ones(len(obs), bool) if action_mask is None else np.asarray(action_mask)[:, Action.REFINE]
        return np.where(allowed, Action.REFINE, Action.CONTINUE).astype(np.int64)


class RandomPolicy(Blind):
    """Draw actions with fixed shares of continue, stop and refine, whatever is seen.

    Raises:
        ValueError: not three shares that are at least 0 and add up to 1.
    """

    flops = 0.0

    def __init__(self, shares: Any, seed: int = 0) -> None:
        self.shares = np.asarray(shares, dtype=np.float64)
        if self.shares.shape != (len(Action),) or (self.shares < 0).any() or abs(self.shares.sum() - 1) > 1e-6:
            raise ValueError(f"expected three shares that add up to 1, got {np.atleast_1d(shares).tolist()}")
        self.seed, self._rng = seed, np.random.default_rng(seed)

    @property
    def fingerprint(self) -> str:
        """The shares and the seed."""
        return "random-" + "-".join(f"{share:.3f}" for share in self.shares) + f"-{self.seed}"

    def act(self, obs: Any, action_mask: Any = None) -> np.ndarray:
        """Actions (B,) int64; an inadmissible one is drawn again among the others."""
        return self._choose(self._rng.random((len(obs), 1)), action_mask)

    def act_in(self, obs: Any, action_mask: Any, episodes: Sequence[Generated]) -> np.ndarray:
        """As `act`, each draw being its episode's own: prompt, seed and number of decisions so far determine it.

        What an item gets then depends neither on the others in its batch nor on an interruption.
        """
        drawn = [self._draw(made.prompt, made.seed, len(made.actions)) for made in episodes]
        return self._choose(np.array(drawn)[:, None], action_mask)

    def _draw(self, prompt: str, seed: int, turn: int) -> float:
        return np.random.default_rng([self.seed, zlib.crc32(prompt.encode()), seed, turn]).random()

    def _choose(self, drawn: np.ndarray, action_mask: Any) -> np.ndarray:
        """Actions (B,) int64 for uniform numbers (B, 1)."""
        allowed = np.ones((len(drawn), len(Action)), bool) if action_mask is None else np.asarray(action_mask)
        weights = np.where(allowed, self.shares, 0.0)
        weights[weights.sum(1) == 0, Action.CONTINUE] = 1.0
        bounds = (weights / weights.sum(1, keepdims=True)).cumsum(1)
        return (drawn >= bounds[:, :-1]).sum(1).astype(np.int64)
