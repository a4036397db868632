"""`AdaptivePipeline`: prompts in, pictures out, with a trained agent deciding each picture's steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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


class AdaptivePipeline:
    """An agent on its environment, most likely action first; anything with an agent's ``act`` and ``flops`` will do.

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
        running: dict[int, tuple[int, Generated]] = {}  # lane -> (index, what it has cost so far)
        free = list(range(env.num_envs))
        while waiting or running:
            if waiting and free:
                observation, info = self._start(free[: len(waiting)], waiting, running)
            began = time.perf_counter()
            active = sorted(running)
            actions = np.zeros(env.num_envs, np.int64)
            episodes = [running[lane][1] for lane in active]
            actions[active] = self._decide(observation[active], info["action_mask"][active], episodes)
            observation, reward, terminated, _, info = env.step(actions)
            share = (time.perf_counter() - began) / len(active)
            for lane in active:
                running[lane][1].actions.append(int(info["action_taken"][lane]))
                running[lane][1].reward += float(reward[lane])
                running[lane][1].seconds += share
            ended = [lane for lane in active if terminated[lane]]
            free = [lane for lane in range(env.num_envs) if lane not in running or lane in ended]
            yield [self._finish(running.pop(lane), lane, info) for lane in ended]

    def _decide(self, observation: Any, action_mask: np.ndarray, episodes: list[Generated]) -> np.ndarray:
        """Actions of the running lanes; who draws at random is told whose turn it is, so that lanes do not mix."""
        draw = getattr(self.agent, "act_in", None)
        return self.agent.act(observation, action_mask) if draw is None else draw(observation, action_mask, episodes)

    def _start(
        self,
        lanes: list[int],
        waiting: list[tuple[int, tuple[str, int]]],
        running: dict[int, tuple[int, Generated]],
    ) -> tuple[Any, dict[str, Any]]:
        began = time.perf_counter()
        taken = [waiting.pop(0) for _ in lanes]
        mask = np.isin(np.arange(self.env.num_envs), lanes)
        options = {"prompt": [p for _, (p, _) in taken], "seed": [s for _, (_, s) in taken], "reset_mask": mask}
        result = self.env.reset(options=options)
        share = (time.perf_counter() - began) / len(lanes)
        for lane, (index, (prompt, seed)) in zip(lanes, taken, strict=True):
            running[lane] = index, Generated(prompt, seed, np.zeros(0, np.uint8), seconds=share)
        return result

    def _finish(self, entry: tuple[int, Generated], lane: int, info: dict[str, Any]) -> tuple[int, Generated]:
        index, made = entry
        made.picture = self.env.final_image(lane)
        made.nfe, made.forward_passes = int(info["nfe"][lane]), int(info["forward_passes"][lane])
        made.net_flops = float(info["net_flops"][lane]) + len(made.actions) * self.agent.flops
        return index, made
