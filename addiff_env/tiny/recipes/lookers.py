"""Make everything that looks at pictures anew, in order: ``addiff world train lookers``.

CLIP, DINO, the reward model, the verifier and the preview decoder, from what the present diffusion model draws. Every recipe resumes where
it was; ``<work>/lookers.json`` says how long each took (the last time it ran) and with which options.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from addiff_env.tiny.recipes import common

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


def command(recipe: str, work: Path, out: Path, seed: int) -> list[str]:
    """The command line of one recipe."""
    shared = ("--work", str(work), "--out", str(out), "--seed", str(seed))
    return [sys.executable, "-m", "addiff_env.cli", "world", "train", recipe, *shared, *RECIPES[recipe]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipes; returns the exit status."""
    args = common.arguments("world train lookers", __doc__ or "", argv, only="")
    chosen = args.only.split(",") if args.only else list(RECIPES)
    if unknown := sorted(set(chosen) - set(RECIPES)):
        raise SystemExit(f"unknown recipes {', '.join(unknown)}; known: {', '.join(RECIPES)}")
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "lookers.json"
    times = json.loads(path.read_text()) if path.exists() else {}
    for recipe in (name for name in RECIPES if name in chosen):
        started = time.monotonic()
        subprocess.run(command(recipe, args.work, args.out, args.seed), check=True)
        seconds = round(time.monotonic() - started)
        times[recipe] = {"seconds": seconds, "seed": args.seed, "options": list(RECIPES[recipe])}
        path.write_text(json.dumps(times, indent=2) + "\n")

    return 0
