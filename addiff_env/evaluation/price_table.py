"""Measure an agent with a price input at prices across its range, and keep the table in its bundle.

    addiff agent table runs/train/prices/agent
    addiff agent table runs/train/prices/agent --prices 0.002 0.004 0.008 --limit 512

Held-out prompts, the most likely actions, in the agent's own environment. The table is what `AdaptivePipeline` finds
the price of a ``target_nfe`` by. Every price is written down as soon as it is measured: the same command goes on where
it was stopped, and may add prices. On other prompts, or with other models, all are measured anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from addiff_env.agent import Agent
from addiff_env.agent.price_table import PricePoint, PriceTable
from addiff_env.env.prices import check_price, price_at
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item, id_list_hash, load_benchmark
from addiff_env.evaluation.methods.policy_method import PolicyMethod
from addiff_env.evaluation.metrics.registry import is_embedded_world
from addiff_env.evaluation.report.text import aligned
from addiff_env.evaluation.run.fingerprint import WEIGHTS, environment_of
from addiff_env.loading.paths import resolve_model
from addiff_env.pipeline import make_agent_env
from addiff_env.stats import at_least_one
from addiff_env.storage.commands import interruptible
from addiff_env.storage.files import claim
from addiff_env.storage.inputs import fingerprints
from addiff_env.tiny.checker import check_picture
from addiff_env.tiny.scenes import SIZE

NUMBER = 7  # of prices, evenly spaced by their logarithm, ends included
EMBEDDED, EVERYDAY = "tiny-dev", "addiff_env:data/everyday_held_out.txt"  # prompts that nobody trains on


def measure_price(
    env: DiffusionDenoiseVectorEnv, agent: Agent, items: Sequence[Item], price: float, judged: bool
) -> PricePoint:
    """Means over pictures of ``items`` at ``price``; ``judged``: also the share that the exact checker accepts."""
    rows, successes = [], []
    with tqdm(total=len(items), desc=f"price {price:g}", unit="image", leave=False) as bar:
        for group in PolicyMethod(env, agent, price=price).make(list(items)):
            rows += [(made.nfe, made.net_flops, made.reward, made.quality) for _, made in group]
            successes += [check_picture(made.picture, made.prompt).satisfied for _, made in group if judged]
            bar.update(len(group))
    nfe, net_flops, reward, quality = np.mean(rows, axis=0).tolist()
    return PricePoint(price, nfe, net_flops, reward, quality, float(np.mean(successes)) if judged else None)


def record_table(
    folder: Path, benchmark: str | None = None, limit: int | None = None, prices: Sequence[float] = (), lanes: int = 32
) -> PriceTable:
    """Measure what the table of the bundle in ``folder`` lacks, and write it there, price by price.

    Args:
        folder: of the bundle.
        benchmark: name, or file, of prompts; None: held-out ones of the agent's own kind.
        limit: prompts, categories in turn.
        prices: None named: `NUMBER` of them from one end of the agent's range to the other.
        lanes: denoised in one batch.

    Raises:
        FileNotFoundError, ValueError: as `Agent.load` and `load_benchmark`; an agent without a price input, or a price
            beyond its range. FolderBusyError: another process writes the bundle.
    """
    Agent.load(folder).require_price_input()
    with claim(folder, "agent table"):
        agent = Agent.load(folder)  # another process may have recorded something meanwhile
        asked = _asked_prices(agent, prices)
        name = benchmark or (EMBEDDED if agent.environment[0].startswith("AdDiffusion-Tiny-") else EVERYDAY)
        items = load_benchmark(resolve_model(name), limit)
        reward = agent.config.get("reward")  # as training left it: scales may have moved
        env = make_agent_env(agent, min(lanes, len(items)), **({"reward": reward} if reward else {}))
        judged = is_embedded_world(items) and (env.config.height, env.config.width) == (SIZE, SIZE)
        measured_on = {"benchmark": name, **_stamp(agent, env, items)}
        kept = agent.price_table
        points = kept.points if kept is not None and kept.measured_on == measured_on else ()
        for price in [price for price in asked if price not in {point.price for point in points}]:
            points = (*points, measure_price(env, agent, items, price, judged))
            agent.config["prices"] = PriceTable(points, measured_on).kept()
            agent.save(folder)
        return PriceTable(points, measured_on)


def _asked_prices(agent: Agent, prices: Sequence[float]) -> list[float]:
    bounds = agent.price_range
    assert bounds is not None
    if prices:
        return list(dict.fromkeys(check_price(price, bounds) for price in prices))
    number = 1 if bounds[0] == bounds[1] else NUMBER
    return [float(f"{price:.6g}") for price in price_at(bounds, np.linspace(-1, 1, number))]


def _stamp(agent: Agent, env: DiffusionDenoiseVectorEnv, items: Sequence[Item]) -> dict[str, Any]:
    """What the numbers depend on, JSON-able."""
    settings = json.dumps([environment_of(agent, {}), agent.config.get("reward")], sort_keys=True)
    return {
        "pictures": len(items),
        "id_list_sha256": id_list_hash(items),
        "agent": agent.fingerprint,
        "settings": hashlib.sha256(settings.encode()).hexdigest()[:12],
        "contents": fingerprints({name: getattr(env.config, name) for name in WEIGHTS}),
        "dtype": env.backbone.dtype_name,
    }


def describe(table: PriceTable) -> str:
    """A line for each price."""
    judged = any(point.success is not None for point in table.points)
    lines = [["price", "NFE", "net GFLOPs", "return", "quality", *(["success"] if judged else [])]]
    for point in table.points:
        numbers = f"{point.nfe:.2f} {point.net_flops / 1e9:.2f} {point.reward:.4f} {point.quality:.4f}".split()
        success = "-" if point.success is None else f"{100 * point.success:.1f}%"
        lines.append([f"{point.price:g}", *numbers, *([success] if judged else [])])
    return "\n".join([f"{table.measured_on['pictures']} pictures of {table.measured_on['benchmark']}", *aligned(lines)])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(prog="addiff agent table", description=__doc__.split("\n")[0])
    parser.add_argument("agent", help="folder of an agent bundle")
    parser.add_argument("--prompts", help=f"benchmark or file (default: {EMBEDDED}; elsewhere {EVERYDAY})")
    parser.add_argument("--limit", type=at_least_one, default=256, help="prompts, categories in turn (256)")
    parser.add_argument("--prices", type=float, nargs="+", default=(), help=f"default: {NUMBER} across the range")
    parser.add_argument("--num-envs", type=at_least_one, default=32, help="lanes denoised in one batch (32)")
    options = parser.parse_args(argv)
    folder = Path(resolve_model(options.agent))
    with interruptible(lambda: f"the prices measured so far are kept in {folder}"):
        print(describe(record_table(folder, options.prompts, options.limit, options.prices, options.num_envs)))
    return 0
