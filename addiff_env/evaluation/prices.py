"""What agents and hand-made rules earn at every price of an evaluation, with the same looks.

``addiff world prices --agent runs/tiny/agent`` chooses for every price the best rule of each kind: a fixed number of
steps, ``threshold:n:tau``, and ``two-step:early:turn:late:enough``. Candidates are those that earn most by a record of
training prompts, as `addiff_env.tiny.measures.optimal_stopping` judges them; they are played on these prompts in the
agent's own environment, and the one that earns most there is chosen. Rules and agents are then compared on ``dev``
pictures. A picture is worth 1 if the checker is satisfied, each evaluation costs the price; net FLOPs, looks included,
stand beside. The last column is the paired difference from the best of the three rules, with its 95% interval.

``--rules FILE`` keeps the choice, for ``addiff evaluate`` and ``addiff world bars``; where it exists, it is read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
from scipy.special import logit
from tqdm import tqdm

from addiff_env.agent import Agent
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.acceptance import difference, in_words, tuning_items
from addiff_env.evaluation.benchmarks.items import Item, id_list_hash, load_benchmark
from addiff_env.evaluation.methods.base import Method
from addiff_env.evaluation.methods.registry import make_method
from addiff_env.evaluation.statistics.families import at_price
from addiff_env.perception.scorers import LatentScorer, load_scorer, reads_latents
from addiff_env.pipeline import make_agent_env
from addiff_env.stats import at_least_one
from addiff_env.storage.files import read_json, write_whole
from addiff_env.tiny.checker import check_picture
from addiff_env.tiny.measures.calibration import load_or_record
from addiff_env.tiny.measures.optimal_stopping import (
    PRICES,
    Policy,
    Walks,
    fixed,
    mean_outcome,
    refine_or_stop,
    refinement_under,
    two_step,
    walks_of,
)

CHANCES = (0.2, 0.35, 0.5, 0.65)  # below which a rule refines
EARLY = (0.0, 0.1, 0.2, 0.3, 0.4)  # likewise, before it turns; 0: never
ENOUGH = (0.9, 0.95, 0.97, 2.0)  # above which a rule stops; 2: never
COLUMNS = ("satisfied", "nfe", "net_flops")

Chosen = dict[float, dict[str, str]]  # of each price the best rule of each kind, as a method's name


def rules(walks: Walks) -> dict[str, dict[str, Policy]]:
    """Every rule that is tried, by kind and method name."""
    first, steps = walks.first, walks.steps
    turns = range(first, steps - 2)
    return {
        "fixed": {f"stop-{step}": fixed(step) for step in range(first, steps + 1)},
        "threshold": {
            f"threshold:{at}:{logit(least):.4g}": refine_or_stop(at, least) for at, least in product(turns, CHANCES)
        },
        "two-step": {
            f"two-step:{early:g}:{turn}:{late:g}:{enough:g}": two_step(early, late, turn, enough)
            for early, turn, late, enough in product(EARLY, turns, CHANCES, ENOUGH)
        },
    }


def finalists(walks: Walks, prices: Sequence[float], number: int) -> dict[str, list[str]]:
    """Names of each kind: the ``number`` that earn most on ``walks`` at each of the ``prices``."""
    found = {}
    for kind, named in rules(walks).items():
        worth = {name: mean_outcome(walks, rule, refinement_under(walks, rule)) for name, rule in named.items()}
        best = [
            sorted(named, key=lambda name: worth[name] @ [-1, price])[:number]  # noqa: B023 (used at once)
            for price in prices
        ]
        found[kind] = list(dict.fromkeys(name for names in best for name in names))
    return found


def choose_rules(
    env: DiffusionDenoiseVectorEnv, walks: Walks, items: Sequence[Item], prices: Sequence[float], number: int
) -> Chosen:
    """Play the `finalists` on ``items``, training prompts, and take of each kind the best at each price."""
    tried = finalists(walks, prices, number)
    names = [name for kind in tried.values() for name in kind]
    played = {name: play(make_method(name, env), items) for name in tqdm(names, "rules", unit="rule", leave=False)}
    return {
        price: {
            kind: max(named, key=lambda name: earned(played[name], price).mean())  # noqa: B023 (used at once)
            for kind, named in tried.items()
        }
        for price in prices
    }


def keep_rules(path: Path, chosen: Chosen, **measured_on: Any) -> None:
    """Write what was chosen, and on what, as JSON."""
    text = {repr(price): named for price, named in chosen.items()}
    write_whole(path, json.dumps({**measured_on, "rules": text}, indent=2) + "\n")


def read_rules(path: Path) -> Chosen:
    """What `keep_rules` wrote.

    Raises:
        ValueError: no such file's content.
    """
    try:
        return {float(price): dict(named) for price, named in read_json(path)["rules"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no rules of addiff world prices --rules ({error})") from error


def play(method: Method, items: Sequence[Item]) -> np.ndarray:
    """`COLUMNS` (N, 3) of the pictures that ``method`` makes of ``items``, in their order."""
    made = {item: result for group in method.make(list(items)) for item, result in group}
    satisfied = [check_picture(made[item].picture, item.prompt).satisfied for item in items]
    costs = [(made[item].nfe, made[item].net_flops) for item in items]
    return np.column_stack([satisfied, costs]).astype(float)


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
        words += f"  {in_words(difference(values, earned(rival, price), prompts))}"
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


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """What the command line says."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="addiff world prices", description=__doc__, formatter_class=raw)
    parser.add_argument("--agent", type=Path, nargs="+", required=True, help="bundles, of one environment")
    parser.add_argument("--prices", type=float, nargs="+", default=list(PRICES))
    parser.add_argument("--number", type=at_least_one, default=256, help="dev pictures, categories in turn (256)")
    parser.add_argument("--tune", type=at_least_one, default=256, help="training prompts for choosing rules (256)")
    parser.add_argument("--finalists", type=at_least_one, default=3, help="rules of each kind played for a price (3)")
    parser.add_argument("--record", type=Path, help="file that keeps the record of those prompts")
    parser.add_argument("--rules", type=Path, help="file that keeps which rules were chosen")
    parser.add_argument("--num-envs", type=at_least_one, default=64)
    return parser.parse_args(argv)


def chosen_rules(args: argparse.Namespace, env: DiffusionDenoiseVectorEnv) -> Chosen:
    """The rules of ``--rules``, chosen and written there if it does not exist."""
    if args.rules is not None and args.rules.exists():
        return read_rules(args.rules)
    items = tuning_items(env, args.tune, seed=0)
    rows = [{"prompt": item.prompt, "seed": item.seed} for item in items]
    verifier = cast(LatentScorer, load_scorer(env.config.scorer))  # `world_of` lets no other pass
    walks = walks_of(load_or_record(args.record, env.config, rows), verifier)
    chosen = choose_rules(env, walks, items, args.prices, args.finalists)
    if args.rules is not None:
        keep_rules(args.rules, chosen, training_prompts=len(items), id_list_sha256=id_list_hash(items))
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    args = options(argv)
    items = load_benchmark("tiny-dev", args.number)
    agents = {str(folder): Agent.load(folder) for folder in args.agent}
    env = world_of(next(iter(agents.values())), min(args.num_envs, len(items)))
    chosen, prompts = chosen_rules(args, env), [item.prompt for item in items]
    print(f"{len(items)} dev pictures")
    print(f"{'price':>6}  {'policy':<46}{'success':>8}{'NFE':>7}{'GFLOPs':>8}{'return':>9}  ahead of the best rule")
    played: dict[str, np.ndarray] = {}
    for price, named in chosen.items():
        for name in named.values():
            if name not in played:
                played[name] = play(make_method(name, env), items)
            print(line(price, name, played[name]), flush=True)
        rival = max((played[name] for name in named.values()), key=lambda found: earned(found, price).mean())
        for name, agent in agents.items():
            own = at_price("agent", price if env.config.price_range else None)
            outcomes = play(make_method(own, env, agent), items)
            print(line(price, name, outcomes, rival, prompts), flush=True)
    return 0
