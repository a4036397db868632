"""What is measured: environments of one set of settings, an agent for them, prompts and requests."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cached_property
from itertools import count
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from addiff_env.agent import Agent, PolicyNet
from addiff_env.cli.bench.rounds import Figure, Rounds, Side
from addiff_env.cli.chosen import Chosen
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.pipeline import Request, make_agent_env
from addiff_env.types import Action, Generated

TEXTS = ("a red circle left of a blue star", "two green squares", "a large yellow ring", "a pink cross above a star")
AGENT = "addiff_env:tiny/weights/agent_prices"  # of the embedded world's own models
SEEN = ("model", "clip", "dino", "scorer", "reads", "price_range")  # settings that an agent must know
# Settings of an environment in which nobody looks before the end.
BLIND: dict[str, Any] = {
    "reads": [],
    "observe_every": 1_000_000,
    "reward": {"clip_weight": 0.0, "reward_weight": 0.0, "instability": 0.0},
}


class StaggeredAgent(Agent):
    """Stops each picture after a number of decisions that its seed gives; an untrained network takes its time besides.

    Where there is no agent for an environment its lanes end at different times all the same.
    """

    def __init__(self, parts: dict[str, int], env: dict[str, Any], decisions: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(PolicyNet(parts), {"observation": parts, "env": env})
        self.decisions = max(1, decisions)

    def act_in(self, obs: Any, action_mask: Any, made: Sequence[Generated]) -> np.ndarray:
        """Actions (B,) of lanes that make the pictures ``made``."""
        self.act(obs, action_mask)
        wanted = [zlib.crc32(str(one.seed).encode()) % self.decisions for one in made]
        ends = [len(one.actions) >= number for one, number in zip(made, wanted, strict=True)]
        return np.where(ends, int(Action.STOP), int(Action.CONTINUE))


class Subject:
    """Environments of the ``chosen`` settings and an agent.

    Args:
        chosen: id, lanes and settings.
        rounds: how often each side is timed.
        prompts: pictures of a comparison that makes pictures.
        agent: a bundle; None: the embedded world's agent for every price where it fits, else a `StaggeredAgent`.
        price: of an evaluation, for an agent with a price input; None: the middle of its range.

    Raises:
        ValueError: as `Agent.from_pretrained` and its environment, or a price that the agent cannot act by.
    """

    def __init__(
        self, chosen: Chosen, rounds: int, prompts: int, agent: str | None = None, price: float | None = None
    ) -> None:
        self.chosen, self.prompts, self._rounds = chosen, prompts, rounds
        self.seconds: dict[str, dict[str, list[float]]] = {}  # by comparison and side
        self._calls = count()
        self.trained = self._shipped() if agent is None else Agent.from_pretrained(agent)
        self._price = price if price is None or self.trained is None else self.trained.check_price(price)

    def _shipped(self) -> Agent | None:
        """The embedded world's agent, unless the chosen settings show other things than it knows."""
        agent = Agent.from_pretrained(AGENT)
        env_id, kwargs = agent.environment
        own, chosen = gym.spec(env_id).kwargs | kwargs, self.chosen.overrides
        fits = env_id == self.chosen.env_id and all(chosen.get(name, own[name]) == own[name] for name in SEEN)
        return agent if fits else None

    # ----------------------------------------------------------------- environments

    def env(self, num_envs: int | None = None, **more: Any) -> DiffusionDenoiseVectorEnv:
        """The chosen environment with lanes that wait."""
        settings: dict[str, Any] = {"num_envs": num_envs or self.lanes, "autoreset_mode": AutoresetMode.DISABLED}
        made = gym.make_vec(self.chosen.env_id, **settings | self.chosen.overrides | more).unwrapped
        assert isinstance(made, DiffusionDenoiseVectorEnv)
        return made

    @property
    def lanes(self) -> int:
        """Lanes of a batch."""
        return self.chosen.num_envs

    @cached_property
    def rounds(self) -> Rounds:
        """What times."""
        return Rounds(self._rounds, self.looking.backbone.device)

    @cached_property
    def looking(self) -> DiffusionDenoiseVectorEnv:
        """With everything that a policy of this id sees."""
        return self.env()

    @cached_property
    def blind(self) -> DiffusionDenoiseVectorEnv:
        """In which nobody looks."""
        return self.env(**BLIND)

    def acting_env(self, num_envs: int, **more: Any) -> DiffusionDenoiseVectorEnv:
        """With the looks of the agent, which may be others than the id's own."""
        if self.trained is None:
            return self.env(num_envs, **more)
        return make_agent_env(self.trained, num_envs, self.chosen.env_id, **self.chosen.overrides | more)

    @cached_property
    def acting(self) -> DiffusionDenoiseVectorEnv:
        """`acting_env` of all lanes."""
        return self.looking if self.trained is None else self.acting_env(self.lanes)

    @cached_property
    def agent(self) -> Agent:
        """Acts on `acting`."""
        if self.trained is not None:
            return self.trained
        env = {"id": self.chosen.env_id, "kwargs": self.chosen.overrides}
        return StaggeredAgent(self.looking.parts, env, self.looking.config.num_inference_steps)

    @property
    def price(self) -> float | None:
        """Of an evaluation, where the agent acts by it."""
        return self.agent.middle_price if self._price is None else self._price

    # ----------------------------------------------------------------- work

    def texts(self, number: int) -> list[str]:
        """Prompts that no cache knows, each with the same words as always."""
        return [TEXTS[k % len(TEXTS)] + " " * next(self._calls) for k in range(number)]

    def requests(self, number: int | None = None) -> list[Request]:
        """So many as are asked for; without a number as are to be made."""
        texts = self.texts(self.prompts if number is None else number)
        return [Request(k, text, k, price=self.price) for k, text in enumerate(texts)]

    def continues(self, env: DiffusionDenoiseVectorEnv) -> None:
        """The whole schedule without decisions."""
        env.reset(options={"prompt": self.texts(env.num_envs), "seed": list(range(env.num_envs))})
        while not env.done.all():
            env.step(np.zeros(env.num_envs, np.int64))

    def timed(self, comparison: str, sides: dict[str, Side], at_most: int | None = None) -> dict[str, np.ndarray]:
        """`Rounds.in_turns`, and kept; ``at_most`` so many rounds."""
        number = self.rounds.number if at_most is None else min(at_most, self.rounds.number)
        found = self.rounds.in_turns(comparison, sides, number)
        self.seconds[comparison] = {name: values.tolist() for name, values in found.items()}
        return found

    def against(self, comparison: str, sides: dict[str, Side], baseline: str) -> list[Figure]:
        """How long each side takes, as multiples of the baseline."""
        found = self.timed(comparison, sides)
        others = [name for name in found if name != baseline]
        return [Figure(comparison, f"{name} / {baseline}", (found[name] / found[baseline]).tolist()) for name in others]
