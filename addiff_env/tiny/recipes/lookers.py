"""Make everything that looks at pictures anew, in order: ``addiff world train lookers``.

CLIP, DINO, the reward model, the verifier and the preview decoder, from what the present diffusion model draws. Every
recipe resumes where it was; ``<work>/lookers.json`` says how long each took (the last time it ran) and with which
options.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from addiff_env.storage.files import write_whole
from addiff_env.tiny.recipes import common
from addiff_env.tiny.recipes.command import run_recipe

RECIPES: dict[str, tuple[str, ...]] = {
    "data": (),
    "generate": ("--guidance", "4", "--number", "6400", "--previews", "6000"),
    "clip": ("--steps", "300"),
    "dino": ("--steps", "120"),
    "reward": ("--steps", "1400", "--generated-from", "0.1"),
    "endings": ("--stops", "2", "--dense-every", "11"),
    "verifier": (),
    "preview": (),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipes until one fails; returns the exit status."""
    args = common.arguments("world train lookers", __doc__ or "", argv, only="")
    chosen = args.only.split(",") if args.only else list(RECIPES)
    if unknown := sorted(set(chosen) - set(RECIPES)):
        raise ValueError(f"unknown recipes {', '.join(unknown)}; known: {', '.join(RECIPES)}")
    shared = [word for name in common.SHARED for word in (f"--{name}", str(getattr(args, name)))]
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "lookers.json"
    times = json.loads(path.read_text()) if path.exists() else {}
    for recipe in (name for name in RECIPES if name in chosen):
        started = time.monotonic()
        if status := run_recipe(recipe, *shared, *RECIPES[recipe]):
            return status
        seconds = round(time.monotonic() - started)
        times[recipe] = {"seconds": seconds, "seed": args.seed, "options": list(RECIPES[recipe])}
        write_whole(path, json.dumps(times, indent=2) + "\n")
    return 0
