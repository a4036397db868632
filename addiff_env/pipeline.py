"""`AdaptivePipeline`: prompts in, pictures out, with a trained agent deciding each picture's steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from addiff_env.agent import Agent
from addiff_env.env import DiffusionDenoiseVectorEnv
from addiff_env.types import Generated


def make_agent_env(agent: Agent, num_envs: int, **overrides: Any) -> DiffusionDenoiseVectorEnv:
    """The environment an agent was trained on, with lanes that wait when they have ended.

    Raises:
        ValueError: as `Agent.environment` and the environment.
    """
    name, kwargs = agent.environment
    modes: dict[str, Any] = {"num_envs": num_envs, "autoreset_mode": AutoresetMode.DISABLED}
    envs = gym.make_vec(name, **modes, **kwargs | overrides).unwrapped
    assert isinstance(envs, DiffusionDenoiseVectorEnv)
    return envs


@dataclass
class _Episode:
    """A running lane: what it makes, and which of the looks that the environment charged were made use of."""

    index: int
    made: Generated
    fresh: bool  # the latest look has not been read yet
    read: int = 0
    unread: int = 0

    def decide(self, sees: bool) -> None:
        """Whoever decides reads the latest look, or does not."""
        if sees and self.fresh:
            self.read, self.fresh = self.read + 1, False

    def look(self) -> None:
        """The environment looks again."""
        self.unread, self.fresh = self.unread + self.fresh, True


class AdaptivePipeline:
    """An agent on its environment, most likely action first; anything with an agent's ``act`` and ``flops`` will do.

    Net FLOPs are what the environment charges, and the policy's own. Whoever has ``sees(obs) -> (B,) bool`` (the rules
    of `addiff_env.evaluation.policies`) pays for the looks that it reads only, and of those for preview and reward
    model only, as a program of that rule alone would; its seconds are still those of looking at everything.

    Raises:
        ValueError: lanes that restart by themselves, or an agent that sees other observations than ``env`` makes.

    >>> pipeline = AdaptivePipeline.from_pretrained("addiff_env/tiny/weights/agent")  # doctest: +SKIP
    >>> pictures = pipeline(["a red circle", "two blue stars"], seeds=[0, 1])  # doctest: +SKIP
    """

    def __init__(self, env: DiffusionDenoiseVectorEnv, agent: Any) -> None:
        if env.autoreset_mode != AutoresetMode.DISABLED:
            raise ValueError(f"the pipeline needs lanes that wait (autoreset DISABLED), got {env.autoreset_mode}")
        if isinstance(agent, Agent):
            agent.require_layout(env.perception.parts)
        self.env, self.agent = env, agent

    @classmethod
    def from_pretrained(cls, folder: str | Path, num_envs: int = 16, **overrides: Any) -> AdaptivePipeline:
        """Load an agent (a folder, or ``owner/name`` on the Hub) and make its environment with ``num_envs`` lanes.

        ``overrides`` change the environment's settings.

        Raises:
            FileNotFoundError, ValueError: as `Agent.from_pretrained` and the environment.
        """
        agent = Agent.from_pretrained(folder)
        return cls(make_agent_env(agent, num_envs, **overrides), agent)

    def __call__(self, prompts: str | Sequence[str], seeds: int | Sequence[int] | None = None) -> list[Generated]:
        """Make one picture per prompt, in order; without ``seeds`` they are drawn at random.

        Raises:
            ValueError: different numbers of prompts and seeds; TypeError: a prompt that is no string.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if seeds is None:
            seeds = [int(seed) for seed in np.random.default_rng().integers(2**31, size=len(texts))]
        numbers = [seeds] if isinstance(seeds, int) else list(seeds)
        if len(texts) != len(numbers):
            raise ValueError(f"{len(texts)} prompts but {len(numbers)} seeds")
        results = dict(pair for group in self.stream(texts, numbers) for pair in group)
        return [results[index] for index in range(len(texts))]

    def stream(self, prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[list[tuple[int, Generated]]]:
        """Yield groups of (index, picture) as they finish; a lane that ends takes the next prompt at once."""
        env = self.env
        waiting = list(enumerate(zip(prompts, seeds, strict=True)))
        running: dict[int, _Episode] = {}  # by lane
        free = list(range(env.num_envs))
        while waiting or running:
            if waiting and free:
                observation, info = self._start(free[: len(waiting)], waiting, running)
            began = time.perf_counter()
            active = sorted(running)
            actions = np.zeros(env.num_envs, np.int64)
            actions[active] = self._decide(
                observation[active], info["action_mask"][active], [running[lane] for lane in active]
            )
            observation, reward, terminated, _, info = env.step(actions)
            share = (time.perf_counter() - began) / len(active)
            for lane in active:
                made = running[lane].made
                made.actions.append(int(info["action_taken"][lane]))
                made.reward += float(reward[lane])
                made.seconds += share
                if not terminated[lane] and len(made.actions) % env.config.observe_every == 0:
                    running[lane].look()
            ended = [lane for lane in active if terminated[lane]]
            free = [lane for lane in range(env.num_envs) if lane not in running or lane in ended]
            yield [self._finish(running.pop(lane), lane, info) for lane in ended]

    def _decide(self, observation: Any, action_mask: np.ndarray, episodes: list[_Episode]) -> np.ndarray:
        """Actions of the running lanes; who draws at random is told whose turn it is, so that lanes do not mix."""
        if self._selective:
            for episode, sees in zip(episodes, self.agent.sees(observation), strict=True):
                episode.decide(bool(sees))
        draw = getattr(self.agent, "act_in", None)
        if draw is None:
            return self.agent.act(observation, action_mask)
        return draw(observation, action_mask, [episode.made for episode in episodes])

    def _start(
        self,
        lanes: list[int],
        waiting: list[tuple[int, tuple[str, int]]],
        running: dict[int, _Episode],
    ) -> tuple[Any, dict[str, Any]]:
        began = time.perf_counter()
        taken = [waiting.pop(0) for _ in lanes]
        mask = np.isin(np.arange(self.env.num_envs), lanes)
        options = {"prompt": [p for _, (p, _) in taken], "seed": [s for _, (_, s) in taken], "reset_mask": mask}
        result = self.env.reset(options=options)
        share = (time.perf_counter() - began) / len(lanes)
        for lane, (index, (prompt, seed)) in zip(lanes, taken, strict=True):
            made = Generated(prompt, seed, np.zeros(0, np.uint8), seconds=share)
            running[lane] = _Episode(index, made, fresh=self.env.config.warmup_steps > 0 and not self.env.done[lane])
        return result

    def _finish(self, episode: _Episode, lane: int, info: dict[str, Any]) -> tuple[int, Generated]:
        made = episode.made
        made.picture = self.env.final_image(lane)
        made.nfe, made.forward_passes = int(info["nfe"][lane]), int(info["forward_passes"][lane])
        made.net_flops = float(info["net_flops"][lane]) + len(made.actions) * self.agent.flops
        if self._selective:
            made.net_flops -= self._refund(episode)
        return episode.index, made

    @property
    def _selective(self) -> bool:
        """Whether the policy says which looks it reads."""
        return hasattr(self.agent, "sees")

    @cached_property
    def _spared(self) -> dict[str, float]:
        """FLOPs of what is charged and not used: a look, the rest of one that was read, texts."""
        price, perception = self.env.price, self.env.perception
        text = perception.text_flops()
        words = perception.verdict_text_flops()
        return {
            "look": price["look"],
            "rest": price["look"] - price["verdict"],
            "text": text,
            "others' text": text - words,
        }

    def _refund(self, episode: _Episode) -> float:
        spared = self._spared
        text = spared["others' text" if episode.read else "text"]
        return (episode.unread + episode.fresh) * spared["look"] + episode.read * spared["rest"] + text
