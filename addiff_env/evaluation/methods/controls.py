"""Controls of H4: an agent's decisions replayed with another mask, or its NFE spent on fixed steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.base import Batched
from addiff_env.evaluation.methods.samplers import FixedSteps
from addiff_env.pipeline import FAULT
from addiff_env.types import Action, Generated, ResultRow

Scripts = Mapping[tuple[str, int], ResultRow]  # an agent's rows by (prompt, seed)


class Replay(Batched):
    """An agent's recorded decisions on an environment that differs in one setting, so that NFE are the same.

    Args:
        env: lanes that wait when they have ended (autoreset DISABLED).
        name: e.g. ``agent, mask=full``.
        scripts: the agent's rows by (prompt, seed).

    Raises:
        ValueError: an item that the agent has no row for.
    """

    def __init__(self, env: DiffusionDenoiseVectorEnv, name: str, scripts: Scripts) -> None:
        super().__init__(env, name, env.num_envs)
        self.scripts, self.expected_nfe = scripts, _mean_nfe(scripts)

    def _batch(self, items: list[Item]) -> list[Generated]:
        env, scripts = self.env, [_script(self.scripts, item).actions for item in items]
        mask = np.arange(env.num_envs) < len(items)
        options = {"prompt": [item.prompt for item in items], "seed": [item.seed for item in items]}
        env.reset(options=options | {"reset_mask": mask})
        env.park(~mask)  # lanes without an item wait
        for t in range(max(1, *map(len, scripts))):  # one step even of lanes that broke down in their warm-up
            running = ~env.done
            if not running.any():
                break
            actions = [script[t] if t < len(script) else int(Action.STOP) for script in scripts]
            info = env.step(np.array(actions + [int(Action.STOP)] * (env.num_envs - len(items))))[-1]
        return [
            Generated(
                item.prompt,
                item.seed,
                env.final_image(lane),
                list(scripts[lane]),
                int(info["nfe"][lane]),
                int(info["forward_passes"][lane]),
                float(info["net_flops"][lane]),
                note=FAULT if info["fault"][lane] else "",
            )
            for lane, item in enumerate(items)
        ]


class MatchedSteps(Batched):
    """Fixed steps, per picture as many as the agent spent on it: what continuing would have made of the same NFE."""

    def __init__(self, env: DiffusionDenoiseVectorEnv, name: str, scripts: Scripts) -> None:
        super().__init__(env, name)
        self.scripts, self.expected_nfe = scripts, _mean_nfe(scripts)

    def make(self, items: list[Item]) -> Iterator[list[tuple[Item, Generated]]]:
        """Make one picture per item."""
        spent = [_script(self.scripts, item).nfe for item in items]
        for number in sorted(set(spent)):
            chosen = [item for item, own in zip(items, spent, strict=True) if own == number]
            yield from FixedSteps(self.env, number).make(chosen)


def _mean_nfe(scripts: Scripts) -> float:
    return float(np.mean([row.nfe for row in scripts.values()])) if scripts else 0.0


def _script(scripts: Scripts, item: Item) -> ResultRow:
    row = scripts.get((item.prompt, item.seed))
    if row is None:
        raise ValueError(f"the agent has no row for {item.prompt!r}, seed {item.seed}: run it on the same items first")
    return row
