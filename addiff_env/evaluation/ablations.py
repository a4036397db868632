"""What each part of an agent's training is worth: agents that lack one, beside agents that have all.

``addiff world ablations runs/ablation`` plays the agents of ``runs/ablation/<ablation>-<seed>/agent``, each in its own
environment, at one price of an evaluation on the same ``dev`` pictures. A picture is worth 1 if the checker is
satisfied, each evaluation costs the price; net FLOPs, looks included, stand beside. Seeds of an ablation are one group:
the mean over them, and the paired difference of its return from that of ``none`` with a 95% bootstrap interval over
prompts. What was played is kept in each run's folder, so that the same command goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from addiff_env.agent import Agent
from addiff_env.evaluation.acceptance import difference, in_words
from addiff_env.evaluation.benchmarks.items import Item, id_list_hash, load_benchmark
from addiff_env.evaluation.methods.registry import make_method
from addiff_env.evaluation.prices import earned, play
from addiff_env.evaluation.run.version import code_version
from addiff_env.evaluation.statistics.families import at_price
from addiff_env.pipeline import make_agent_env
from addiff_env.stats import at_least_one
from addiff_env.storage.files import read_json, write_whole

WHOLE = "none"  # the ablation that lacks nothing


class Ablation(NamedTuple):
    """The agents that lack the same: their run folders by seed."""

    name: str
    runs: dict[str, Path]


def found_in(folder: Path) -> list[Ablation]:
    """The ablations of a sweep, `WHOLE` first.

    Raises:
        ValueError: there is none, or no `WHOLE` to compare with.
    """
    runs: dict[str, dict[str, Path]] = {}
    for bundle in sorted(folder.glob("*-*/agent/agent.json")):
        name, _, seed = bundle.parents[1].name.rpartition("-")
        runs.setdefault(name, {})[seed] = bundle.parents[1]
    if WHOLE not in runs:
        there = ", ".join(runs) or "nothing"
        raise ValueError(f"{folder} holds no {WHOLE}-<seed>/agent to compare with, only: {there}")
    return [Ablation(name, runs[name]) for name in sorted(runs, key=lambda name: (name != WHOLE, name))]


def outcomes_of(run: Path, items: Sequence[Item], price: float) -> np.ndarray:
    """What `play` says of the pictures that the agent of ``run`` makes, kept in its folder or made now."""
    agent, kept = Agent.load(run / "agent"), run / "ablation.json"
    made_of = {"agent": agent.fingerprint, "price": price, "pictures": id_list_hash(items), "code": code_version()}
    if kept.exists() and {**(found := read_json(kept)), "outcomes": None} == {**made_of, "outcomes": None}:
        return np.array(found["outcomes"])
    env = make_agent_env(agent, min(64, len(items)))
    outcomes = play(make_method(at_price("agent", price if env.config.price_range else None), env, agent), items)
    write_whole(kept, json.dumps({**made_of, "outcomes": outcomes.tolist()}) + "\n")
    return outcomes


def line(ablation: Ablation, outcomes: np.ndarray, whole: np.ndarray, price: float, prompts: Sequence[str]) -> str:
    """One row of the table, of `play`'s outcomes, means over seeds."""
    success, evaluations, flops = outcomes.mean(0)
    values = earned(outcomes, price)
    costs = f"{success:>9.3f}{evaluations:>7.2f}{flops / 1e9:>8.2f}"
    words = f"{ablation.name:<20}{len(ablation.runs):>6}{costs}{values.mean():>9.4f}"
    if ablation.name == WHOLE:
        return words
    return words + f"  {in_words(difference(values, earned(whole, price), prompts))}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="addiff world ablations", description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, help="of a sweep, with folders <ablation>-<seed>")
    parser.add_argument("--price", type=float, default=0.004, help="of an evaluation (0.004)")
    parser.add_argument("--number", type=at_least_one, default=384, help="dev pictures, categories in turn (384)")
    args = parser.parse_args(argv)
    items = load_benchmark("tiny-dev", args.number)
    prompts = [item.prompt for item in items]
    print(f"{len(items)} dev pictures at a price of {args.price:g}")
    print(f"{'ablation':<20}{'seeds':>6}{'success':>9}{'NFE':>7}{'GFLOPs':>8}{'return':>9}  minus {WHOLE}")
    whole = None
    for ablation in found_in(args.folder):
        outcomes = np.mean([outcomes_of(run, items, args.price) for run in ablation.runs.values()], axis=0)
        whole = outcomes if whole is None else whole
        print(line(ablation, outcomes, whole, args.price, prompts), flush=True)
    return 0
