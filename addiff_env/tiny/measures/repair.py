"""What a refinement is worth: how often it repairs a failed picture, and how often it keeps a good one.

``addiff world repair`` denoises dev prompts to the last decision of the schedule, judges the
picture there, refines once, denoises to the same point again and judges again, for every kind of mask.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

import addiff_env
from addiff_env.diffusion.attention import MASKS
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.stats import at_least_one
from addiff_env.tiny.checker import check_picture
from addiff_env.tiny.prompt_splits import balanced, load_split
from addiff_env.types import Action


def outcomes(env: DiffusionDenoiseVectorEnv, rows: Sequence[dict[str, Any]], refine: bool) -> np.ndarray:
    """Whether each row's picture (N,) is satisfied when stopped before the last step, refined once or not."""
    results: list[bool] = []
    for start in range(0, len(rows), env.num_envs):
        part = list(rows[start : start + env.num_envs])
        part += [part[-1]] * (env.num_envs - len(part))  # lanes without a row repeat the last one
        env.reset(options={"prompt": [r["prompt"] for r in part], "seed": [r["seed"] for r in part]})
        _continue_to_last(env)
        if refine:
            env.step(np.full(env.num_envs, Action.REFINE))
            _continue_to_last(env)
        env.step(np.full(env.num_envs, Action.STOP))
        results += [
            check_picture(env.final_image(lane), part[lane]["prompt"]).satisfied for lane in range(env.num_envs)
        ]
    return np.array(results[: len(rows)])


def _continue_to_last(env: DiffusionDenoiseVectorEnv) -> None:
    while env.step_index[0] < env.config.num_inference_steps - 1:
        env.step(np.full(env.num_envs, Action.CONTINUE))


def measure(rows: Sequence[dict[str, Any]], num_envs: int, **settings: Any) -> dict[str, float]:
    """Repair and keep rates of one setting of the embedded world's environment, and the success without.

    A rate of no picture (none failed, or none was good) is NaN.
    """
    settings |= {"observe_every": 1000, "max_nfe": 1000}  # nobody looks, nothing is short
    envs = gym.make_vec(
        "AdDiffusion-Tiny-v0", min(num_envs, len(rows)), autoreset_mode=AutoresetMode.DISABLED, **settings
    ).unwrapped
    assert isinstance(envs, DiffusionDenoiseVectorEnv)
    before, after = outcomes(envs, rows, refine=False), outcomes(envs, rows, refine=True)
    return {
        "success": float(before.mean()),
        "repair": float(after[~before].mean()) if (~before).any() else float("nan"),
        "keep": float(after[before].mean()) if before.any() else float("nan"),
        "failed": int((~before).sum()),
    }


def _rate(share: float) -> str:
    return "n/a" if np.isnan(share) else f"{share:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns the exit status."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="addiff world repair", description=__doc__, formatter_class=defaults)
    parser.add_argument("--number", type=at_least_one, default=192, help="dev items, categories in turn")
    parser.add_argument("--masks", nargs="+", default=list(MASKS))
    parser.add_argument("--renoise", nargs="+", default=["0.85"], help="levels to go back to")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="other settings of the environment")
    parser.add_argument("--num-envs", type=at_least_one, default=64)
    args = parser.parse_args(argv)
    rows = balanced(load_split("dev"), args.number)
    extra = {name: json.loads(value) for name, _, value in (item.partition("=") for item in args.set)}
    print(f"{addiff_env.TINY['num_inference_steps']} steps, {len(rows)} dev prompts, settings {extra}")
    print(f"{'mask':<18}{'renoise':>8}{'success':>9}{'repair':>8}{'keep':>7}{'failed':>8}")
    for mask in args.masks:
        for renoise in args.renoise:
            m = measure(rows, args.num_envs, mask=mask, renoise=float(renoise), **extra)
            rates = f"{_rate(m['success']):>9}{_rate(m['repair']):>8}{_rate(m['keep']):>7}{m['failed']:>8}"
            print(f"{mask:<18}{renoise:>8}{rates}", flush=True)
    return 0
