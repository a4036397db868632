"""How well a picture does that is stopped early: success by grid, step and number of finishing steps.

``addiff world finishes`` denoises dev prompts on each grid, stops every lane after each of its steps,
finishes it in each number of steps, and judges what comes of it. Stopped with as many finishing steps as the grid has
left a lane ends where it would have ended anyway.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

import addiff_env
from addiff_env.diffusion.backbones import to_uint8
from addiff_env.env.config import EnvConfig
from addiff_env.stats import at_least_one
from addiff_env.tiny.checker import check_picture
from addiff_env.tiny.prompt_splits import balanced, load_split
from addiff_env.tiny.recipes.endings import FreeLanes

BATCH = 64


def outcomes(
    config: EnvConfig, rows: Sequence[dict[str, Any]], first: int, finishes: Sequence[int]
) -> dict[tuple[int, int], np.ndarray]:
    """Whether each row's picture is satisfied, (N,) bool, by (step stopped after, finishing steps); (N, 0): the end."""
    found: dict[tuple[int, int], list[bool]] = {}
    length = config.num_inference_steps
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        prompts, lanes = [row["prompt"] for row in part], FreeLanes(config, len(part))
        every = np.arange(len(part))

        def note(key: tuple[int, int], latents: Any, lanes: FreeLanes = lanes, prompts: list[str] = prompts) -> None:
            pictures = to_uint8(lanes.backbone.decode(latents))
            results = [
                check_picture(picture, prompt).satisfied for picture, prompt in zip(pictures, prompts, strict=True)
            ]
            found.setdefault(key, []).extend(results)

        lanes.start(prompts, [row["seed"] for row in part])
        for step in range(1, length):
            lanes.step(every)
            for steps in finishes if step >= first else ():
                if step + steps <= length:
                    note((step, steps), lanes.stopped(every, steps))
        lanes.step(every)
        note((length, 0), lanes.latents(every))
    return {key: np.array(values) for key, values in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="addiff world finishes", description=__doc__, formatter_class=defaults)
    parser.add_argument("--number", type=at_least_one, default=192, help="dev items, categories in turn")
    parser.add_argument("--steps", type=at_least_one, nargs="+", default=[10, 8, 7, 6], help="grids")
    parser.add_argument(
        "--finish", type=at_least_one, nargs="+", default=[1, 2, 3, 4], help="numbers of finishing steps"
    )
    parser.add_argument("--first", type=at_least_one, default=2, help="the first step to stop after")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args(argv)
    rows = balanced(load_split("dev"), args.number)
    print(f"{len(rows)} dev prompts\n{'grid':>5}{'stop':>6}{'finish':>8}{'NFE':>5}{'success':>9}")
    for grid in args.steps:
        settings = {"num_inference_steps": grid, "warmup_steps": min(args.first, grid - 1), "dtype": args.dtype}
        found = outcomes(EnvConfig(**addiff_env.TINY | settings), rows, args.first, args.finish)
        for (step, steps), values in sorted(found.items(), key=lambda item: (sum(item[0]), item[0])):
            print(f"{grid:>5}{step:>6}{steps:>8}{step + steps:>5}{values.mean():>9.3f}", flush=True)
    return 0
