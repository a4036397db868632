"""Methods that make pictures: the trained agent, and fixed-step solvers without anybody looking."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from addiff_env.agent import Agent
from addiff_env.backbones import initial_noise, to_uint8
from addiff_env.env import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks import Item
from addiff_env.samplers import ddim_step, make_schedule


@dataclass
class Made:
    """A picture and what it cost."""

    item: Item
    picture: np.ndarray  # uint8 (H, W, 3)
    actions: list[int] = field(default_factory=list)
    nfe: int = 0
    forward_passes: int = 0
    net_flops: float = 0.0
    seconds: float = 0.0


class Method(Protocol):
    """A way to make pictures; `make` yields them in groups, so that finished ones can be written down."""

    name: str
    solver: str
    policy: str

    def make(self, items: list[Item]) -> Iterator[list[Made]]:
        """Make one picture per item."""


class FixedSteps:
    """DDIM with N steps, stated as ``ddim-N``: same model, guidance and noise as the environment ``env``."""

    def __init__(self, env: DiffusionDenoiseVectorEnv, steps: int, batch_size: int = 64) -> None:
        self.env, self.steps, self.batch_size = env, steps, batch_size
        self.name, self.solver, self.policy = f"ddim-{steps}", f"ddim-{steps}", f"ddim-{steps}"
        self.schedule = make_schedule(env.backbone.scheduler_config, steps, env.config.device)

    def make(self, items: list[Item]) -> Iterator[list[Made]]:
        """Denoise in batches; nothing but the final picture is decoded."""
        for start in range(0, len(items), self.batch_size):
            yield self._batch(items[start : start + self.batch_size])

    def _batch(self, items: list[Item]) -> list[Made]:
        began, env = time.perf_counter(), self.env
        conditioning = env.backbone.encode_prompts([item.prompt for item in items])
        latents = initial_noise(env.backbone, env.latent_shape, [item.seed for item in items])
        for step in range(self.steps):
            at = torch.full((len(items),), step, device=latents.device)
            prediction = env.backbone.predict(
                latents,
                self.schedule.timesteps[at],
                self.schedule.alpha_from[at],
                conditioning,
                env.config.guidance_scale,
                capture=False,
            )
            latents = ddim_step(self.schedule, latents, prediction.x0, at)
        pictures = to_uint8(env.backbone.decode(latents))
        seconds = (time.perf_counter() - began) / len(items)
        passes = self.steps * env.passes_per_nfe
        flops = passes * env.price["denoiser"] + env.price["decode"] + 2 * env.price["text"]
        return [Made(i, p, [], self.steps, passes, flops, seconds) for i, p in zip(items, pictures, strict=True)]


def make_agent_env(agent: Agent, num_envs: int, **overrides: Any) -> DiffusionDenoiseVectorEnv:
    """The environment an agent was trained on, with lanes that wait when they have ended."""
    spec = agent.config["env"]
    kwargs = spec["kwargs"] | overrides
    envs = gym.make_vec(spec["id"], num_envs=num_envs, autoreset_mode=AutoresetMode.DISABLED, **kwargs)
    unwrapped = envs.unwrapped
    assert isinstance(unwrapped, DiffusionDenoiseVectorEnv)
    return unwrapped


class AgentMethod:
    """A trained agent on its environment, most likely action first."""

    def __init__(self, env: DiffusionDenoiseVectorEnv, agent: Agent, name: str = "agent") -> None:
        self.env, self.agent, self.name = env, agent, name
        self.solver = f"{env.config.solver}-{env.config.num_inference_steps}"
        self.policy = agent.fingerprint

    def make(self, items: list[Item]) -> Iterator[list[Made]]:
        """Fill the lanes with the items in order; a lane that ends takes the next item at once."""
        env, waiting = self.env, list(items)
        running: dict[int, Made] = {}
        lanes = list(range(min(env.num_envs, len(waiting))))
        observation, info = self._start(lanes, waiting, running)
        while running:
            began = time.perf_counter()
            actions = np.zeros(env.num_envs, np.int64)
            active = sorted(running)
            actions[active] = self.agent.act(observation[active], info["action_mask"][active])
            observation, _, terminated, _, info = env.step(actions)
            for lane in active:
                running[lane].actions.append(int(info["action_taken"][lane]))
            share = (time.perf_counter() - began) / len(active)
            for lane in active:
                running[lane].seconds += share
            ended = [lane for lane in active if terminated[lane]]
            yield [self._finish(running.pop(lane), lane, info) for lane in ended]
            if ended and waiting:
                observation, info = self._start(ended[: len(waiting)], waiting, running)

    def _start(self, lanes: list[int], waiting: list[Item], running: dict[int, Made]) -> tuple[Any, Any]:
        began = time.perf_counter()
        items = [waiting.pop(0) for _ in lanes]
        mask = np.isin(np.arange(self.env.num_envs), lanes)
        options = {"prompt": [i.prompt for i in items], "seed": [i.seed for i in items], "reset_mask": mask}
        result = self.env.reset(options=options)
        share = (time.perf_counter() - began) / len(lanes)
        for lane, item in zip(lanes, items, strict=True):
            running[lane] = Made(item, np.zeros(0, np.uint8), seconds=share)
        return result

    def _finish(self, made: Made, lane: int, info: dict[str, Any]) -> Made:
        made.picture = self.env.final_image(lane)
        made.nfe, made.forward_passes = int(info["nfe"][lane]), int(info["forward_passes"][lane])
        made.net_flops = float(info["net_flops"][lane]) + len(made.actions) * self.agent.flops
        return made
