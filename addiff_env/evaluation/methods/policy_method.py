"""A policy as a method that makes pictures."""

from __future__ import annotations

from collections.abc import Iterator

from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.rule_policies import Policy
from addiff_env.evaluation.statistics.families import at_price
from addiff_env.pipeline import LaneScheduler, Request, price_of
from addiff_env.types import Generated


class PolicyMethod:
    """A policy on its environment: a trained agent, or a hand-made rule, which pays for the looks that it reads.

    ``price`` is that of an evaluation, for agents with a price input; it becomes part of the name.
    """

    def __init__(
        self, env: DiffusionDenoiseVectorEnv, policy: Policy, name: str = "agent", price: float | None = None
    ) -> None:
        self.lanes, self.backbone, self.price = LaneScheduler(env, policy), env.backbone, price
        self.name = at_price(name, price)
        self.solver = f"{env.config.solver}-{env.config.num_inference_steps}"
        self.policy = policy.fingerprint
        self.expected_nfe = float(env.config.num_inference_steps)

    def make(self, items: list[Item]) -> Iterator[list[tuple[Item, Generated]]]:
        """Run the policy on every item."""
        price = price_of(self.lanes.env, self.lanes.policy, self.price)
        requests = [Request(index, item.prompt, item.seed, price=price) for index, item in enumerate(items)]
        for group in self.lanes.run(requests):
            yield [(items[index], made) for index, made in group]
