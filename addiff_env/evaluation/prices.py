"""What agents and hand-made rules earn at every price of an evaluation, with the same looks.

``addiff world prices --agent runs/tiny/agent`` chooses for every price the best rule of each kind (threshold, two-step,
fixed step) by what a record of training prompts says of it, as `addiff_env.tiny.measures.optimal_stopping` judges them,
then plays rules and agents on the same pictures in the agent's own environment. A picture is worth 1 if the checker is
satisfied, each evaluation costs the price; net FLOPs, looks included, stand beside. The last column is the paired
difference from the rule that earns most at the price, with its 95% interval.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np

from addiff_env.agent import Agent
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.acceptance import difference, tuning_items
from addiff_env.perception.scorers import LatentScorer, load_scorer, reads_latents
from addiff_env.pipeline import make_agent_env
from addiff_env.stats import at_least_one
from addiff_env.tiny.checker import check_picture
from addiff_env.tiny.measures.calibration import load_or_record, probability
from addiff_env.tiny.measures.optimal_stopping import (
    PRICES,
    Policy,
    Walks,
    fixed,
    mean_outcome,
    refinement_under,
    threshold,
    two_step,
    walks_of,
)
from addiff_env.tiny.prompt_splits import balanced, load_split
from addiff_env.types import Action

CHANCES = (0.2, 0.35, 0.5, 0.65)  # below which a rule refines
EARLY = (0.0, 0.1, 0.2, 0.3, 0.4)  # likewise, before it turns
ENOUGH = (0.9, 0.95, 0.97, 2.0)  # above which a rule stops; 2: never
TURNS = (4, 5, 6)
COLUMNS = ("satisfied", "nfe", "net_flops")

Act = Callable[[DiffusionDenoiseVectorEnv, np.ndarray, np.ndarray], np.ndarray]  # env, observations, masks to actions


def rules(walks: Walks) -> dict[str, dict[str, Policy]]:
    """Every rule that is tried, by kind and name."""
    first, steps = walks.first, walks.steps
    return {
        "fixed": {f"stop after {step}": fixed(step) for step in range(first, steps + 1)},
        "threshold": {
            f"from {at}: < {least:g}": threshold(at, least) for at, least in product(range(first, steps - 2), CHANCES)
        },
        "two-step": {
            f"< {early:g}, from {turn} < {late:g}, stop > {enough:g}": two_step(early, late, turn, enough)
            for early, late, turn, enough in product(EARLY, CHANCES, TURNS, ENOUGH)
        },
    }


def best_rules(walks: Walks, prices: Sequence[float]) -> dict[float, dict[str, Policy]]:
    """For every price the rule of each kind that earns most on ``walks``, by kind and name."""
    tried = rules(walks)
    outcomes = {
        (kind, name): mean_outcome(walks, rule, refinement_under(walks, rule))
        for kind, named in tried.items()
        for name, rule in named.items()
    }

    def best(kind: str, price: float) -> str:
        return max(tried[kind], key=lambda name: outcomes[kind, name] @ [1, -price])

    chosen = {price: {kind: best(kind, price) for kind in tried} for price in prices}
    return {
        price: {f"{kind}: {name}": tried[kind][name] for kind, name in names.items()} for price, names in chosen.items()
    }


def by_rule(rule: Policy) -> Act:
    """Play a rule; a refinement that is not admissible goes on instead."""

    def act(env: DiffusionDenoiseVectorEnv, _: np.ndarray, mask: np.ndarray) -> np.ndarray:
        go_on = probability(env.features.outlook.cpu().numpy())
        features = np.stack([np.ones(env.num_envs), probability(env.reward_score), go_on], 1)
        actions = np.full(env.num_envs, int(Action.CONTINUE))
        for step in np.unique(env.step_index[~env.done]):
            rows = env.step_index == step
            actions[rows] = rule(features[rows], int(step))
        refused = (actions == Action.REFINE) & ~mask[:, Action.REFINE]
        return np.where(refused, Action.CONTINUE, actions)

    return act


def by_agent(agent: Agent) -> Act:
    """Play an agent."""
    return lambda env, observations, mask: agent.act(observations, mask)


def play(
    env: DiffusionDenoiseVectorEnv, act: Act, rows: Sequence[dict[str, Any]], price: float | None = None
) -> np.ndarray:
    """`COLUMNS` (N, 3) of the pictures of ``rows``; at a ``price``, where the environment shows one."""
    results = []
    for start in range(0, len(rows), env.num_envs):
        part = list(rows[start : start + env.num_envs])
        asked = part + [part[-1]] * (env.num_envs - len(part))  # lanes without a row repeat the last one
        options = {"prompt": [row["prompt"] for row in asked], "seed": [row["seed"] for row in asked]}
        observations, info = env.reset(options=options | ({} if price is None else {"price": price}))
        while not env.done.all():
            observations, *_, info = env.step(act(env, observations, info["action_mask"]))
        results += [
            (check_picture(env.final_image(lane), row["prompt"]).satisfied, env.nfe[lane], env.net_flops[lane])
            for lane, row in enumerate(part)
        ]
    return np.array(results, float)


def earned(outcomes: np.ndarray, price: float) -> np.ndarray:
    """What pictures (N,) of `play`'s ``outcomes`` earn at a ``price``."""
    return outcomes[:, 0] - price * outcomes[:, 1]


def line(
    price: float, name: str, outcomes: np.ndarray, rival: np.ndarray | None = None, prompts: Sequence[str] = ()
) -> str:
    """One row of the table; with the difference from a ``rival``'s outcomes."""
    success, evaluations, flops = outcomes.mean(0)
    values = earned(outcomes, price)
    words = f"{price:>6g}  {name:<46}{success:>8.3f}{evaluations:>7.2f}{flops / 1e9:>8.2f}{values.mean():>9.4f}"
    if rival is not None:
        ahead = difference(values, earned(rival, price), prompts)
        words += f"  {ahead.estimate:+.4f} [{ahead.low:+.4f}, {ahead.high:+.4f}]"
    return words


def world_of(agent: Agent, num_envs: int, **overrides: Any) -> DiffusionDenoiseVectorEnv:
    """The agent's environment; ``overrides`` change its settings.

    Raises:
        ValueError: its scorer does not read latents, so that rules have no outlook to act on.
    """
    env = make_agent_env(agent, num_envs, **overrides)
    if not reads_latents(env.perception.scorer):
        raise ValueError(f"rules need a scorer that reads latents, the agent's is {env.config.scorer!r}")
    return env


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="addiff world prices", description=__doc__, formatter_class=defaults)
    parser.add_argument("--agent", type=Path, nargs="+", required=True, help="bundles, of one environment")
    parser.add_argument("--prices", type=float, nargs="+", default=list(PRICES))
    parser.add_argument("--number", type=at_least_one, default=256, help="dev items, categories in turn")
    parser.add_argument("--tune", type=at_least_one, default=256, help="training prompts that rules are chosen on")
    parser.add_argument("--record", type=Path, help="file that keeps the record of those")
    parser.add_argument("--num-envs", type=at_least_one, default=64)
    args = parser.parse_args(argv)
    rows = balanced(load_split("dev"), args.number)
    agents = {str(folder): Agent.load(folder) for folder in args.agent}
    env = world_of(next(iter(agents.values())), min(args.num_envs, len(rows)))
    tuning = [{"prompt": item.prompt, "seed": item.seed} for item in tuning_items(env, args.tune, seed=0)]
    verifier = cast(LatentScorer, load_scorer(env.config.scorer))  # `world_of` lets no other pass
    walks = walks_of(load_or_record(args.record, env.config, tuning), verifier)
    prompts = [row["prompt"] for row in rows]
    print(f"{len(rows)} dev prompts; rules chosen on {len(tuning)} training prompts")
    print(f"{'price':>6}  {'policy':<46}{'success':>8}{'NFE':>7}{'GFLOPs':>8}{'return':>9}  ahead of the best rule")
    played: dict[str, np.ndarray] = {}
    for price, chosen in best_rules(walks, args.prices).items():
        for name, rule in chosen.items():
            if name not in played:
                played[name] = play(env, by_rule(rule), rows)
            print(line(price, name, played[name]), flush=True)
        rival = max((played[name] for name in chosen), key=lambda outcomes: earned(outcomes, price).mean())
        for name, agent in agents.items():
            outcomes = play(env, by_agent(agent), rows, price if env.config.price_range else None)
            print(line(price, name, outcomes, rival, prompts), flush=True)
    return 0
