"""Which grid serves a policy best? Success and evaluations of plain rules, played on several grids.

``addiff world rules --steps 10 8 7 6`` plays dev prompts through the environment with the verifier
alone (nothing is decoded but final pictures): refine where going on is likely to fail, else go on, or stop where
stopping is likely enough to do. One line a rule and grid; looks are not counted as evaluations.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

import addiff_env
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.stats import at_least_one
from addiff_env.tiny.checker import check_picture
from addiff_env.tiny.measures.calibration import probability
from addiff_env.tiny.prompt_splits import balanced, load_split
from addiff_env.tiny.world import WEIGHTS
from addiff_env.types import Action

VERIFIER_ALONE: dict[str, Any] = {
    "reads": ["reward"],
    "reward": {"clip_weight": 0, "reward_weight": 1, "instability": 0},
}

MAX_REFINES = 6


@dataclass(frozen=True)
class Rule:
    """Refine below a chance of going on, ``early`` in the grid's first half, then ``late``; stop above ``enough``."""

    early: float
    late: float
    enough: float = 2.0  # no chance is above it

    def act(self, stop: np.ndarray, go_on: np.ndarray, share: np.ndarray) -> np.ndarray:
        """Actions (B,) at chances ``stop`` and ``go_on`` (B,) and ``share`` (B,) of the grid done."""
        doomed = go_on < np.where(share < 0.5, self.early, self.late)
        return np.where(doomed, Action.REFINE, np.where(stop > self.enough, Action.STOP, Action.CONTINUE))


RULES = {
    "never refine": Rule(0.0, 0.0),
    "late": Rule(0.0, 0.5),
    "early and late": Rule(0.3, 0.5),
    "early and late, stop": Rule(0.3, 0.5, 0.95),
}


def play(env: DiffusionDenoiseVectorEnv, rule: Rule, rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """Whether each row's picture is satisfied, and its evaluations, (N, 2)."""
    results: list[tuple[bool, int]] = []
    for start in range(0, len(rows), env.num_envs):
        part = list(rows[start : start + env.num_envs])
        asked = part + [part[-1]] * (env.num_envs - len(part))  # lanes without a row repeat the last one
        env.reset(options={"prompt": [row["prompt"] for row in asked], "seed": [row["seed"] for row in asked]})
        while not env.done.all():
            stop, go_on = probability(env.reward_score), probability(env.features.outlook.cpu().numpy())
            env.step(rule.act(stop, go_on, env.step_index / env.config.num_inference_steps))
        results += [
            (check_picture(env.final_image(lane), row["prompt"]).satisfied, int(env.nfe[lane]))
            for lane, row in enumerate(part)
        ]
    return np.array(results, float)


def make(steps: int, warmup: int, finish: int, num_envs: int, **settings: Any) -> DiffusionDenoiseVectorEnv:
    """The embedded world on a grid of ``steps``, seen by the verifier alone."""
    grid = {"num_inference_steps": steps, "warmup_steps": warmup, "finish_steps": finish, "max_nfe": 1000}
    settings = {"scorer": str(WEIGHTS / "verifier"), "max_refines": MAX_REFINES, **VERIFIER_ALONE, **grid, **settings}
    env = gym.make_vec("AdDiffusion-Tiny-v0", num_envs, autoreset_mode=AutoresetMode.DISABLED, **settings).unwrapped
    assert isinstance(env, DiffusionDenoiseVectorEnv)
    return env


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="addiff world rules", description=__doc__, formatter_class=defaults)
    parser.add_argument("--number", type=at_least_one, default=192, help="dev items, categories in turn")
    parser.add_argument("--steps", type=at_least_one, nargs="+", default=[10, 8, 7, 6], help="grids")
    parser.add_argument("--warmup", type=at_least_one, default=2)
    parser.add_argument("--finish", type=at_least_one, default=2)
    parser.add_argument("--scorer", default=str(WEIGHTS / "verifier"))
    parser.add_argument("--num-envs", type=at_least_one, default=64)
    parser.add_argument("--price", type=float, default=addiff_env.TINY["reward"]["efficiency"])
    args = parser.parse_args(argv)
    rows = balanced(load_split("dev"), args.number)
    print(f"{len(rows)} dev prompts, return at a price of {args.price:g}")
    print(f"{'grid':>5}  {'rule':<22}{'success':>9}{'NFE':>7}{'return':>9}")
    for steps in args.steps:
        env = make(steps, args.warmup, args.finish, min(args.num_envs, len(rows)), scorer=args.scorer)
        for name, rule in RULES.items():
            success, evaluations = play(env, rule, rows).mean(0)
            worth = success - args.price * evaluations
            print(f"{steps:>5}  {name:<22}{success:>9.3f}{evaluations:>7.2f}{worth:>9.4f}", flush=True)
    return 0
