"""What is left to learn: agents, every rule and perfect foresight in recorded attempts, learned from and held out.

``addiff world replay --attempts runs/tiny/attempts --number 3072 --agent ...`` plays agents that were trained on the
first 3,072 recorded pictures (``addiff train env=tiny_attempts attempts.number=3072``) on these and on the rest. The
rule of each price is the best on the same first pictures, of all that ``addiff world prices`` tries. On what it learned
from a policy that fits the record earns more than the best policy does in the long run, on the rest less; so if it is
hardly ahead of the rule where it learned, that speaks against policies which are (as far as PPO finds what can be
fitted, and the record is the environment). *foresight* knows how every attempt ends, and
what stopping gives: what is between it and the rule is the verifier's to earn, not the policy's.

A picture is worth 1 if the checker is satisfied, each evaluation costs the price; looks are left out. Each picture is
played ``--repeats`` times, as refinements are drawn. Differences have 95% bootstrap intervals over prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from addiff_env.agent import Agent
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.acceptance import difference, in_words
from addiff_env.evaluation.prices import earned, rules, world_of
from addiff_env.stats import at_least_one
from addiff_env.tiny.attempts import RecordedLanes, load_walks
from addiff_env.tiny.measures.optimal_stopping import PRICES, Policy, Walks
from addiff_env.types import Action

Act = Callable[[RecordedLanes], np.ndarray]  # what the lanes do, (B,)
FORESIGHT = "foresight"


def by_rule(policy: Policy) -> Act:
    """A rule on the verifier's two probabilities and the step."""

    def act(lanes: RecordedLanes) -> np.ndarray:
        actions = np.full(lanes.num_envs, int(Action.CONTINUE))
        for step in np.unique(lanes.at):
            rows = np.flatnonzero(lanes.at == step)
            actions[rows] = policy(lanes.walks.features(step, lanes.attempt[rows]), int(step))
        return actions

    return act


def by_agent(agent: Agent) -> Act:
    """The agent's most likely admissible actions."""

    def act(lanes: RecordedLanes) -> np.ndarray:
        return agent.act(lanes.observation(), lanes.action_masks())

    return act


def foresee(lanes: RecordedLanes) -> np.ndarray:
    """Stop as soon as the picture would satisfy; refine at once where the attempt never will."""
    walks, steps = lanes.walks, np.arange(lanes.walks.steps)
    good = np.concatenate([walks.stopped == 1, walks.ended[:, None]], 1)[lanes.attempt]
    ahead = (good & (np.append(steps, walks.steps) >= lanes.at[:, None])).any(1)
    now = good[np.arange(lanes.num_envs), lanes.at]
    return np.select([now, ahead], [Action.STOP, Action.CONTINUE], Action.REFINE)


def outcomes(lanes: RecordedLanes, act: Act, price: float, repeats: int) -> np.ndarray:
    """Mean success and evaluations (N, 2) of the recorded pictures, each played ``repeats`` times."""
    rng, lanes.price[:] = np.random.default_rng(0), price
    lanes.begin(np.arange(lanes.num_envs), np.tile(lanes.plain, repeats))
    result, running = np.zeros((lanes.num_envs, 2)), np.ones(lanes.num_envs, bool)
    while running.any():
        _, satisfied, done = lanes.act(act(lanes), rng)
        ended = running & done
        result[ended] = np.stack([satisfied, lanes.nfe], 1)[ended]
        running &= ~done
        again = np.flatnonzero(done)  # wait somewhere
        lanes.begin(again, np.full(len(again), lanes.plain[0]))
    return result.reshape(repeats, -1, 2).mean(0)


def table(
    env: DiffusionDenoiseVectorEnv,
    agents: dict[str, Agent],
    parts: dict[str, Walks],
    prompts: np.ndarray,
    prices: Sequence[float],
    repeats: int,
) -> str:
    """All policies at all prices, on each of the ``parts`` of a record; the first is what agents learned from."""
    lanes = {name: RecordedLanes(env, walks, repeats * int((walks.source < 0).sum())) for name, walks in parts.items()}
    learned = next(iter(lanes.values()))
    tried = {name: by_rule(rule) for kind in rules(learned.walks).values() for name, rule in kind.items()}
    played = {name: outcomes(learned, act, PRICES[0], repeats) for name, act in tried.items()}
    lines = [f"{'price':>6}  {'policy':<34}{'pictures':<10}{'success':>8}{'NFE':>7}{'return':>8}  ahead of the rule"]
    for price in prices:
        best = max(played, key=lambda name: earned(played[name], price).mean())  # noqa: B023 (used at once)
        for place, where in lanes.items():
            captions = prompts[where.walks.row[where.plain]].tolist()
            rule = outcomes(where, tried[best], price, repeats)
            found = {best: rule, **{name: outcomes(where, by_agent(a), price, repeats) for name, a in agents.items()}}
            if len(agents) > 1:
                found["all agents"] = np.mean([found[name] for name in agents], 0)
            found[FORESIGHT] = outcomes(where, foresee, price, repeats)
            for name, outcome in found.items():
                ahead = difference(earned(outcome, price), earned(rule, price), captions) if name != best else None
                success, nfe = outcome.mean(0)
                words = f"{price:>6g}  {name[-33:]:<34}{place:<10}{success:>8.3f}{nfe:>7.2f}"
                words += f"{earned(outcome, price).mean():>8.4f}"
                lines.append(words + (f"  {in_words(ahead)}" if ahead else ""))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="addiff world replay", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--attempts", type=Path, required=True, help="folder of addiff world train attempts")
    add("--number", type=at_least_one, required=True, help="recorded pictures that the agents were trained on")
    add("--agent", type=Path, nargs="+", required=True, help="bundles, of one environment")
    add("--prices", type=float, nargs="+", default=list(PRICES))
    add("--repeats", type=at_least_one, default=4, help="times that each picture is played (4)")
    args = parser.parse_args(argv)
    agents = {str(folder): Agent.load(folder) for folder in args.agent}
    env = world_of(next(iter(agents.values())), 1)
    walks, prompts = load_walks(args.attempts, env.config)
    if args.number >= len(prompts):
        parser.error(
            f"--number {args.number}: {args.attempts} holds {len(prompts)} pictures, and some are to be held out"
        )
    rows = np.arange(len(prompts))
    parts = {"learned": walks.of_prompts(rows[: args.number]), "held out": walks.of_prompts(rows[args.number :])}
    print(f"{args.number} pictures that agents learned from, {len(prompts) - args.number} others")
    print(table(env, agents, parts, prompts, args.prices, args.repeats))
    return 0
