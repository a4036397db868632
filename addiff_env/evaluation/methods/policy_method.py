"""A policy as a method that makes pictures."""

from __future__ import annotations

from collections.abc import Iterator

from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.rule_policies import Policy
from addiff_env.pipeline import AdaptivePipeline
from addiff_env.types import Generated


class PolicyMethod:
    """A policy on its environment: a trained agent, or a hand-made rule, which pays for the looks that it reads."""

    def __init__(self, env: DiffusionDenoiseVectorEnv, policy: Policy, name: str = "agent") -> None:
        self.pipeline, self.name, self.backbone = AdaptivePipeline(env, policy), name, env.backbone
        self.solver = f"{env.config.solver}-{env.config.num_inference_steps}"
        self.policy = policy.fingerprint
        self.expected_nfe = float(env.config.num_inference_steps)

    def make(self, items: list[Item]) -> Iterator[list[tuple[Item, Generated]]]:
        """Run the policy on every item."""
        for group in self.pipeline.stream([item.prompt for item in items], [item.seed for item in items]):
            yield [(items[index], made) for index, made in group]
