"""What a refinement is worth: how often it repairs a failed picture, and how often it keeps a good one.

``addiff world repair`` denoises dev prompts to the last decision of the schedule, judges the picture there, and for
every kind of mask goes back to that decision, refines once, denoises on and judges again. With ``--record FILE`` what
was measured is kept as it is made, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import addiff_env
from addiff_env.diffusion.attention import MASKS
from addiff_env.diffusion.backbones import to_uint8
from addiff_env.env.config import EnvConfig
from addiff_env.env.denoiser import Denoiser
from addiff_env.env.refine import make_masks, refine
from addiff_env.stats import Z95, at_least_one, clustered_wilson
from addiff_env.storage.commands import interruptible
from addiff_env.storage.files import claim_file
from addiff_env.storage.jsonl import append_objects, read_objects
from addiff_env.tiny.checker import check_picture
from addiff_env.tiny.prompt_splits import balanced, load_split
from addiff_env.tiny.prompts import CATEGORIES
from addiff_env.tiny.recipes.endings import FreeLanes

CONTROL = "full"  # the mask that others are held against
NOTHING = "nothing"  # a mask that renews nothing: what going back, alone, repairs and breaks
SEEDS_APART = 50_000_000  # between the pictures of one prompt, far from every split's seeds


def outcomes(
    lanes: FreeLanes, rows: Sequence[dict[str, Any]], refined_at: int, masks: Sequence[str], renoise: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    """What comes of each row's picture (at most as many as lanes): an object for each mask and level to go back to.

    Args:
        lanes: on the embedded world's model.
        rows: ``prompt`` and ``seed`` each.
        refined_at: the step after which lanes are refined; they are stopped before the last one.
        masks: kinds, or `NOTHING`.
        renoise: levels, as the setting of that name.
    """
    # Lanes without a row repeat the last one.
    asked = [*rows, *[rows[-1]] * (lanes.num_envs - len(rows))]
    every, last = np.arange(lanes.num_envs), lanes.config.num_inference_steps - 1
    lanes.start([row["prompt"] for row in asked], [row["seed"] for row in asked])
    for _ in range(refined_at):
        lanes.step(every)
    state = lanes.state.state_dict()
    before = _stopped(lanes, asked, last)
    for level in renoise:
        denoiser = Denoiser(replace(lanes.config, renoise=level), lanes.backbone)
        for mask in masks:
            lanes.state.load_state_dict(state)
            area = _masks(denoiser, lanes, mask)
            refine(denoiser, lanes.state, every, area)
            after, renewed = _stopped(lanes, asked, last), area.mean((1, 2, 3)).tolist()
            for k, row in enumerate(rows):
                key = {"prompt": row["prompt"], "seed": row["seed"], "mask": mask, "renoise": level}
                yield key | {"before": before[k], "after": after[k], "renewed": renewed[k]}


def _masks(denoiser: Denoiser, lanes: FreeLanes, mask: str) -> torch.Tensor:
    """Masks (B, 1, h, w) of all lanes."""
    if mask == NOTHING:
        return torch.zeros_like(lanes.state.refine_masks)
    return make_masks(denoiser, lanes.state, np.arange(lanes.num_envs), mask)


def _stopped(lanes: FreeLanes, rows: Sequence[dict[str, Any]], last: int) -> list[bool]:
    """Whether each picture is satisfied when its lane goes on to the step ``last`` and is stopped there, or ended."""
    while len(going := np.flatnonzero(lanes.state.step_index < last)):
        lanes.step(going)
    latents = lanes.latents(np.arange(lanes.num_envs))
    if len(open_ := np.flatnonzero(lanes.state.step_index == last)):
        latents[lanes.state.index(open_)] = lanes.stopped(open_)
    pictures = to_uint8(lanes.backbone.decode(latents))
    return [check_picture(picture, row["prompt"]).satisfied for picture, row in zip(pictures, rows, strict=True)]


def pictures(categories: Sequence[str], number: int, seeds: int) -> list[dict[str, Any]]:
    """The first ``number`` dev rows of ``categories``, in turn, each with so many ``seeds``."""
    rows = balanced(tuple(row for row in load_split("dev") if row["category"] in categories), number)
    return [row | {"seed": row["seed"] + k * SEEDS_APART} for k in range(seeds) for row in rows]


# --------------------------------------------------------------------------- what is kept


class Record:
    """Outcomes by picture, mask and level, in a file if there is one.

    Args:
        path: JSON lines; None keeps nothing.
        settings: of the environment; a file of others is refused.

    Raises:
        ValueError: the file was made with other settings, or is damaged.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.found: dict[tuple[Any, ...], dict[str, Any]] = {}
        kept = read_objects(path) if path else []
        if kept and kept[0] != {"settings": settings}:
            raise ValueError(f"{path} was made with {kept[0].get('settings')}, not {settings}: name another file")
        if path and not kept:
            append_objects(path, [{"settings": settings}])
        self._add(kept[1:])

    def _add(self, objects: Sequence[dict[str, Any]]) -> None:
        self.found |= {(o["prompt"], o["seed"], o["mask"], o["renoise"]): o for o in objects}

    def keep(self, objects: Sequence[dict[str, Any]]) -> None:
        """Add outcomes, on disk at once."""
        if self.path:
            append_objects(self.path, objects)
        self._add(objects)

    def of(self, rows: Sequence[dict[str, Any]], mask: str, renoise: Any) -> list[dict[str, Any]]:
        """Those of ``rows`` that are there."""
        keys = [(row["prompt"], row["seed"], mask, renoise) for row in rows]
        return [self.found[key] for key in keys if key in self.found]


def measure(args: argparse.Namespace, rows: Sequence[dict[str, Any]], config: EnvConfig, record: Record) -> None:
    """Make what the record lacks, batch by batch, and say how far it is."""
    size = min(args.num_envs, len(rows))
    lanes, began, made = None, time.monotonic(), 0
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    wanted = [
        (part, [m for m in args.masks if any(len(record.of(part, m, r)) < len(part) for r in args.renoise)])
        for part in parts
    ]
    wanted = [(part, masks) for part, masks in wanted if masks]
    for part, masks in wanted:
        lanes = lanes or FreeLanes(config, size)
        record.keep(list(outcomes(lanes, part, args.refined_at, masks, args.renoise)))
        made += 1
        passed = time.monotonic() - began
        left = passed / made * (len(wanted) - made)
        print(f"{made} of {len(wanted)} batches, {passed:.0f} s gone, about {left:.0f} s left", flush=True)


def table(args: argparse.Namespace, rows: Sequence[dict[str, Any]], record: Record) -> list[str]:
    """Rates with their 95% intervals (Wilson's, pictures of a prompt as a cluster), a line for each mask and level."""
    head = f"{'mask':<18}{'renoise':>12}{'failed':>8}{'repair':>21}{'keep':>21}{'success':>21}{'renewed':>9}"
    lines = [head]
    for mask in args.masks:
        for renoise in args.renoise:
            found = record.of(rows, mask, renoise)
            failed, good = ([o for o in found if o["before"] is value] for value in (False, True))
            rates = "".join(f"{_rate(part):>21}" for part in (failed, good, found))
            renewed = np.mean([o["renewed"] for o in found])
            lines.append(f"{mask:<18}{renoise!s:>12}{len(failed):>8}{rates}{renewed:>9.2f}")
    return lines


def differences(args: argparse.Namespace, rows: Sequence[dict[str, Any]], record: Record) -> list[str]:
    """Rates minus those of `CONTROL` on the same pictures, with 95% intervals over prompts; nothing without it."""
    others = [mask for mask in args.masks if mask != CONTROL]
    if CONTROL not in args.masks or not others:
        return []
    lines = [f"{'minus ' + CONTROL:<18}{'renoise':>12}{'repair':>29}{'keep':>29}"]
    for mask in others:
        for renoise in args.renoise:
            pairs = list(zip(record.of(rows, mask, renoise), record.of(rows, CONTROL, renoise), strict=True))
            parts = ([pair for pair in pairs if pair[0]["before"] is value] for value in (False, True))
            lines.append(f"{mask:<18}{renoise!s:>12}{''.join(f'{_difference(part):>29}' for part in parts)}")
    return lines


def _difference(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """Mean paired difference; its standard error is that of a ratio of sums over prompts (linearised)."""
    if not pairs:
        return "n/a"
    found = np.array([float(one["after"]) - float(other["after"]) for one, other in pairs])
    _, owner = np.unique([one["prompt"] for one, _ in pairs], return_inverse=True)
    sums, clusters = np.bincount(owner, found - found.mean()), owner.max() + 1
    if clusters < 2:
        return f"{found.mean():+.3f}"
    half = Z95 * np.sqrt((sums**2).sum() * clusters / (clusters - 1)) / len(found)
    return f"{found.mean():+.3f} ({found.mean() - half:+.2f} to {found.mean() + half:+.2f})"


def _rate(found: Sequence[dict[str, Any]]) -> str:
    if not found:
        return "n/a"
    after = [float(o["after"]) for o in found]
    low, high = clustered_wilson(after, [o["prompt"] for o in found])
    return f"{np.mean(after):.3f} ({low:.2f}-{high:.2f})"


# --------------------------------------------------------------------------- the command


def level(text: str) -> float | str:
    """A value of the setting ``renoise``."""
    return text if text.startswith("relative:") else float(text)


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """What the command line says."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="addiff world repair", description=__doc__, formatter_class=defaults)
    add = parser.add_argument
    add("--number", type=at_least_one, default=192, help="dev items, categories in turn")
    add("--categories", nargs="+", choices=CATEGORIES, default=list(CATEGORIES), metavar="CATEGORY")
    add("--seeds", type=at_least_one, default=1, help="pictures of each item")
    add("--masks", nargs="+", choices=(*MASKS, NOTHING), default=[*MASKS, NOTHING], metavar="KIND")
    add("--renoise", nargs="+", type=level, default=[0.85], help="levels to go back to")
    add("--refined-at", type=at_least_one, help="the step to refine after; by default the last before the end")
    add("--set", nargs="*", default=[], metavar="NAME=JSON", help="other settings of the environment")
    add("--num-envs", type=at_least_one, default=64)
    add("--record", type=Path, metavar="FILE", help="keep what is measured, and go on from there")
    return parser.parse_args(argv)


def configured(args: argparse.Namespace) -> EnvConfig:
    """The embedded world's settings, with those of the command line; ``refined_at`` is filled in.

    Raises:
        ValueError: a setting that there is not, or a wrong value.
    """
    extra = {name: json.loads(value) for name, _, value in (item.partition("=") for item in args.set)}
    config = EnvConfig(**addiff_env.TINY | extra)
    last = config.num_inference_steps - 1
    args.refined_at = args.refined_at or last
    if args.refined_at > last:
        raise ValueError(f"refined-at must be at most {last}, the last decision, got {args.refined_at}")
    for renoise in args.renoise:
        replace(config, renoise=renoise)
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns the exit status."""
    args = options(argv)
    config, rows = configured(args), pictures(args.categories, args.number, args.seeds)
    settings = {"refined_at": args.refined_at, "set": args.set, "dtype": config.dtype}
    print(f"{config.num_inference_steps} steps, refined after {args.refined_at}, {len(rows)} pictures, {args.set}")
    if args.record is None:
        return _measure_and_print(args, rows, config, settings)
    kept = interruptible(lambda: f"what was measured is kept in {args.record}")
    with kept, claim_file(args.record, "a measurement of repairs"):
        return _measure_and_print(args, rows, config, settings)


def _measure_and_print(
    args: argparse.Namespace, rows: Sequence[dict[str, Any]], config: EnvConfig, settings: dict[str, Any]
) -> int:
    record = Record(args.record, settings)
    measure(args, rows, config, record)
    print("\n".join([*table(args, rows, record), *differences(args, rows, record)]))
    return 0
