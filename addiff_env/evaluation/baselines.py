"""Methods that make pictures: the trained agent, and fixed-step solvers without anybody looking."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol

from addiff_env.agent import Agent
from addiff_env.backbones import denoise, initial_noise, to_uint8
from addiff_env.env import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks import Item
from addiff_env.pipeline import AdaptivePipeline
from addiff_env.types import Generated


class Method(Protocol):
    """A way to make pictures; `make` yields them in groups, so that finished ones can be written down."""

    name: str
    solver: str
    policy: str

    def make(self, items: list[Item]) -> Iterator[list[tuple[Item, Generated]]]:
        """Make one picture per item."""


class FixedSteps:
    """A solver with N steps, stated as ``ddim-N``: same model, guidance and noise as the environment ``env``."""

    def __init__(
        self, env: DiffusionDenoiseVectorEnv, steps: int, solver: str | None = None, batch_size: int = 64
    ) -> None:
        self.env, self.steps, self.batch_size = env, steps, batch_size
        solver = solver or env.backbone.solver
        self.name = self.solver = self.policy = f"{solver}-{steps}"
        self.schedule = env.backbone.schedule(steps, env.latent_shape, solver)

    def make(self, items: list[Item]) -> Iterator[list[tuple[Item, Generated]]]:
        """Denoise in batches; nothing but the final picture is decoded."""
        for start in range(0, len(items), self.batch_size):
            yield self._batch(items[start : start + self.batch_size])

    def _batch(self, items: list[Item]) -> list[tuple[Item, Generated]]:
        began, env = time.perf_counter(), self.env
        noise = initial_noise(env.backbone, env.latent_shape, [item.seed for item in items])
        prompts = [item.prompt for item in items]
        latents = denoise(env.backbone, self.schedule, prompts, noise, env.config.guidance_scale)
        pictures = to_uint8(env.backbone.decode(latents))
        seconds = (time.perf_counter() - began) / len(items)
        passes = self.steps * env.passes_per_nfe
        flops = passes * env.price["denoiser"] + env.price["decode"] + env.price["start"] - env.perception.text_flops()
        cost = (self.steps, passes, flops, seconds)
        return [
            (item, Generated(item.prompt, item.seed, picture, [], *cost))
            for item, picture in zip(items, pictures, strict=True)
        ]


class AgentMethod:
    """A trained agent on its environment."""

    def __init__(self, env: DiffusionDenoiseVectorEnv, agent: Agent, name: str = "agent") -> None:
        self.pipeline, self.name = AdaptivePipeline(env, agent), name
        self.solver = f"{env.config.solver}-{env.config.num_inference_steps}"
        self.policy = agent.fingerprint

    def make(self, items: list[Item]) -> Iterator[list[tuple[Item, Generated]]]:
        """Run the agent on every item."""
        for group in self.pipeline.stream([item.prompt for item in items], [item.seed for item in items]):
            yield [(items[index], made) for index, made in group]
