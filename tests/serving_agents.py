"""An agent with random weights on the small models, as the page's tests want it, and a place to serve."""

import asyncio
import gc
import socket
import warnings
from typing import Any

import torch

from addiff_env.agent import Agent, PolicyNet
from addiff_env.pipeline import make_agent_env

PRICES = [0.001, 0.016]


def small_agent(kwargs: dict[str, Any], table: bool = True) -> Agent:
    """Random weights on the small models; with a price input, and a table that somebody might have measured."""
    config: dict[str, Any] = {"env": {"id": "AdDiffusion-Tiny-v0", "kwargs": kwargs | {"price_range": PRICES}}}
    parts = make_agent_env(Agent(PolicyNet({"x": 1}), config), 1).observer.parts
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = PolicyNet(parts, 8)
    if table:
        means = {"net_flops": 1e9, "reward": 0.0, "quality": 0.0}
        points = [{"price": price, "nfe": nfe} | means for price, nfe in zip(PRICES, (9.57, 4.21), strict=True)]
        config["prices"] = {"measured_on": {}, "points": points}
    return Agent(net, config | {"observation": parts, "hidden": 8})


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def collect_event_loops() -> None:
    """Let go, quietly, of the event loops that Gradio opens where a page is built, and never closes.

    Collected later they would be some other test's warnings.
    """
    asyncio.set_event_loop(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
