"""Measure the embedded world's quality bars: its checker, autoencoder, pictures, previews, attention, speed and size.

``addiff world quality`` measures the shipped weights over the whole ``test`` split, prints
every bar and exits with 1 if one fails; ``--only`` names sections. ``--guidance-sweep 2,3,4,5,6``
measures the success over guidance scales on the ``dev`` split instead: how the shipped scale was chosen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderTiny

import addiff_env
from addiff_env.diffusion.backbones import Backbone, to_uint8
from addiff_env.loading.weights import DTYPES, quiet_loading, resolve_dtype
from addiff_env.perception.encoders import CLIPEncoder
from addiff_env.stats import at_least_one, wilson_interval
from addiff_env.storage.files import write_whole
from addiff_env.tiny.checker import check_picture
from addiff_env.tiny.hard_negatives import hard_negative
from addiff_env.tiny.measures.attention import PEAK_SLACK, attention_outcomes
from addiff_env.tiny.measures.bars import Bar, share, table, worst_share
from addiff_env.tiny.measures.footprint import (
    LANES,
    MODELS,
    lane_milliseconds,
    loading_problem,
    torch_threads,
    weight_bytes,
)
from addiff_env.tiny.measures.pictures import Sample, coloured_region, foreshadowed, generate, pick
from addiff_env.tiny.prompt_splits import load_split
from addiff_env.tiny.prompts import CATEGORIES, Prompt, sample_prompt
from addiff_env.tiny.scenes import EXTENT, SIZE, render, sample_scene
from addiff_env.tiny.world import WEIGHTS, load_world

SECTIONS = ("checker", "autoencoder", "generation", "preview", "speed", "attention", "size")
LEAST_SUCCESS = {
    "single_object": 0.97,
    "two_objects": 0.85,
    "counting": 0.70,
    "position": 0.70,
    "three_objects": 0.45,
    "four_objects": 0.45,
}
TWO_OBJECTS = ("two_objects", "position", "color_attribution")  # categories whose attention is looked at
MIB = 2**20


# --------------------------------------------------------------------------- sections


class Measurements:
    """Every section's bars; what several sections need is made once.

    Args:
        args: the command line of `main`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.counts: dict[str, dict[str, tuple[int, int]]] = {}  # per measurement and category: hits, n

    def backbone(self, dtype: str) -> Backbone:
        """The measured pipeline in one dtype."""
        return load_world(self.args.weights, self.args.device, dtype)

    @cached_property
    def generator(self) -> Backbone:
        """The pipeline that draws the split's pictures."""
        return self.backbone(self.args.dtype)

    @cached_property
    def samples(self) -> list[Sample]:
        """The generated pictures of the split."""
        rows = pick(load_split(self.args.split), self.args.per_category)
        return generate(self.generator, rows, self.args.steps, self.args.guidance)

    @cached_property
    def scenes(self) -> list[tuple[Prompt, Prompt, np.ndarray]]:
        """Random prompts of all categories, a wrong prompt for each, and a rendered scene (64, 64, 3) uint8."""
        scenes = []
        for index, category in enumerate(CATEGORIES):
            rng = np.random.default_rng((self.args.seed, index))
            for _ in range(self.args.per_category or 200):
                prompt = sample_prompt(rng, category)
                scenes.append((prompt, hard_negative(rng, prompt), render(sample_scene(rng, prompt))))
        return scenes

    def _by_category(self, name: str, categories: Sequence[str], outcomes: Sequence[bool]) -> dict[str, list[bool]]:
        """Outcomes by category; their counts are kept under ``name``."""
        groups: dict[str, list[bool]] = {}
        for category, outcome in zip(categories, outcomes, strict=True):
            groups.setdefault(category, []).append(outcome)
        self.counts[name] = {category: (sum(group), len(group)) for category, group in groups.items()}
        return groups

    def checker(self) -> list[Bar]:
        """Rendered truth is right, wrong pairs are refused."""
        categories = [prompt.category for prompt, _, _ in self.scenes]
        right = [check_picture(picture, prompt).satisfied for prompt, _, picture in self.scenes]
        refused = [not check_picture(picture, wrong).satisfied for _, wrong, picture in self.scenes]
        rendered = self._by_category("rendered", categories, right)
        self._by_category("wrong pairs refused", categories, refused)
        return [
            worst_share("checker: rendered truth right", rendered, 0.995),
            share("checker: wrong pairs refused", refused, 0.99),
        ]

    @torch.no_grad()
    def autoencoder(self) -> list[Bar]:
        """Renderings still satisfy their prompts after the shipped autoencoder."""
        folder = self.args.weights / "pipeline" / "vae"
        if not folder.is_dir():
            raise FileNotFoundError(f"no autoencoder {folder}; train it with: addiff world train")
        with quiet_loading():
            vae = AutoencoderTiny.from_pretrained(folder).to(self.args.device)
        pictures = torch.from_numpy(np.stack([picture for _, _, picture in self.scenes]))
        right: list[bool] = []
        for start in range(0, len(pictures), 64):
            inputs = pictures[start : start + 64].to(self.args.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            decoded = to_uint8((vae.decode(vae.encode(inputs).latents).sample / 2 + 0.5).clamp(0, 1))
            prompts = [prompt for prompt, _, _ in self.scenes[start : start + 64]]
            right += [
                check_picture(picture, prompt).satisfied for picture, prompt in zip(decoded, prompts, strict=True)
            ]
        groups = self._by_category("re-encoded", [prompt.category for prompt, _, _ in self.scenes], right)
        return [worst_share("autoencoder: re-encoded right", groups, 0.985)]

    def generation(self) -> list[Bar]:
        """Success by category and of all, and the graded score."""
        satisfied = [sample.result.satisfied for sample in self.samples]
        groups = self._by_category("generated", [sample.row["category"] for sample in self.samples], satisfied)
        bars = [share(f"generation: {c}", groups[c], LEAST_SUCCESS.get(c)) for c in CATEGORIES]
        score = float(np.mean([sample.result.score for sample in self.samples]))
        return [*bars, share("generation: all", satisfied, 0.70, most=0.95, note=f"mean graded score {score:.3f}")]

    def preview(self) -> list[Bar]:
        """Previews at one third of the schedule show where the final objects are."""
        regions = [coloured_region(sample.preview) for sample in self.samples]
        outcomes = [
            shown
            for sample, region in zip(self.samples, regions, strict=True)
            for shown in foreshadowed(sample.result.objects, region)
        ]
        note = f"coloured area of the previews: {100 * np.mean(regions):.0f}%"  # what chance would give
        return [share("preview: objects there at 1/3 (our own bar)", outcomes, 0.80, note=note)]

    def speed(self) -> list[Bar]:
        """One guided evaluation, preview and CLIP; the better dtype counts."""
        with quiet_loading():
            clip = CLIPEncoder(str(self.args.weights / "clip"), self.args.device)
        with torch_threads(2):
            times = {name: lane_milliseconds(self.backbone(name), clip) for name in ("float32", "bfloat16")}
        best = min(times, key=lambda name: times[name])
        where = "2 threads" if self.args.device == "cpu" else self.args.device
        bars = [Bar(f"speed: {name}", value, unit="ms", note=where) for name, value in times.items()]
        return [*bars, Bar(f"speed: a lane in a batch of {LANES}", times[best], most=15.0, unit="ms", note=best)]

    def attention(self) -> list[Bar]:
        """Cross-attention of an object's words peaks inside the object, in satisfied two-object pictures."""
        chosen = [s for s in self.samples if s.row["category"] in TWO_OBJECTS and s.result.satisfied]
        tokenizer = self.generator.tokenizer
        outcomes = {
            when: [hit for sample in chosen for hit in attention_outcomes(sample, getattr(sample, when), tokenizer)]
            for when in ("early_maps", "last_maps")
        }
        categories = [sample.row["category"] for sample in chosen for _ in range(2)]
        self._by_category("attention at 1/3", categories, outcomes["early_maps"])
        reach = [EXTENT[o.shape] * o.radius + PEAK_SLACK for sample in chosen for o in sample.result.objects]
        chance = f"by chance {100 * math.pi * np.mean(np.square(reach)) / SIZE**2:.0f}%" if reach else ""
        return [
            share("attention: peaks in its object at 1/3", outcomes["early_maps"], 0.80, note=chance),
            share("attention: the same at the last step", outcomes["last_maps"]),
        ]

    def size(self) -> list[Bar]:
        """Weights are small, and load with the ordinary classes."""
        sizes = weight_bytes(self.args.weights)
        problems = [loading_problem(name, self.args.weights / name) for name in MODELS]
        damage = "; ".join(filter(None, problems))
        parts = ", ".join(f"{name} {number / MIB:.1f}" for name, number in sizes.items())
        return [
            Bar("size: safetensors of all models", sum(sizes.values()) / MIB, most=40.0, unit="MiB", note=parts),
            Bar("size: folders that load", problems.count(""), least=len(MODELS), unit="folders", note=damage),
        ]


# --------------------------------------------------------------------------- command line


def sweep(measurements: Measurements, scales: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Success per guidance scale: of all prompts, by category, and the mean graded score. Prints as it goes."""
    args = measurements.args
    rows, backbone = pick(load_split(args.split), args.per_category or 16), measurements.backbone(args.dtype)
    results = {}
    for scale in scales:
        samples = generate(backbone, rows, args.steps, scale)
        satisfied = [sample.result.satisfied for sample in samples]
        groups = measurements._by_category(f"{scale:g}", [sample.row["category"] for sample in samples], satisfied)
        shares = {category: float(np.mean(group)) for category, group in groups.items()}
        low, high = wilson_interval(sum(satisfied), len(satisfied))
        score = float(np.mean([sample.result.score for sample in samples]))
        results[f"{scale:g}"] = {"all": float(np.mean(satisfied)), "interval": (low, high), "score": score, **shares}
        parts = "  ".join(f"{name} {value:.2f}" for name, value in shares.items())
        print(
            f"guidance {scale:g}: {np.mean(satisfied):.1%} of {len(rows)} ({low:.1%} to {high:.1%})"
            f"  score {score:.3f}  {parts}",
            flush=True,
        )
    return results


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _sections(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"unknown section {name!r}; known: {', '.join(SECTIONS)}")
    return names


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="addiff world quality", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--only", type=_sections, default=SECTIONS, help=f"comma-separated sections of {','.join(SECTIONS)}")
    add("--per-category", type=at_least_one, help="cases per category (default: 200 scenes, all rows of the split)")
    add("--weights", type=Path, default=WEIGHTS, help="folder with pipeline, clip, dino and reward")
    add(
        "--guidance",
        type=float,
        default=addiff_env.TINY["guidance_scale"],
        help="guidance scale (default: the shipped one)",
    )
    add("--guidance-sweep", type=_floats, help="comma-separated guidance scales: measure their success, nothing else")
    add("--steps", type=at_least_one, default=50, help="DDIM steps")
    add("--split", choices=("dev", "test"), help="prompts (default: test; dev for the sweep, which chooses)")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="of the pipeline; auto: bfloat16 where it is fast")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0, help="seed of the checker's scenes")
    add("--json", type=Path, help="file that receives everything measured")
    args = parser.parse_args(argv)
    args.dtype = resolve_dtype(args.dtype, args.device)
    args.split = args.split or ("dev" if args.guidance_sweep else "test")
    return args


def _conditions(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    files = sorted(args.weights.rglob("*.safetensors"))
    digests = {str(f.relative_to(args.weights)): hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files}
    names = ("guidance", "steps", "split", "dtype", "device", "seed", "per_category")
    versions = {library.__name__: library.__version__ for library in (torch, diffusers, transformers)}
    return {name: getattr(args, name) for name in names} | {"versions": versions, "sha256": digests}


def measure(measurements: Measurements) -> dict[str, Any]:
    """Measure the sections that ``--only`` names, print the table, and return everything."""
    bars: list[Bar] = []
    seconds: dict[str, float] = {}
    for section in measurements.args.only:
        started = time.monotonic()
        bars += getattr(measurements, section)()
        seconds[section] = round(time.monotonic() - started, 1)
    print(table(bars))
    return {"bars": [bar.entry() for bar in bars], "counts": measurements.counts, "seconds": seconds}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns the exit status: 1 if a bar fails."""
    args = _parse(argv)
    if args.json:
        args.json.touch()  # a place that cannot be written to is refused before anything is measured
    print(f"DDIM-{args.steps} in {args.dtype}, guidance {args.guidance_sweep or args.guidance}, {args.split} split")
    measurements = Measurements(args)
    scales = args.guidance_sweep
    result: dict[str, Any] = {"sweep": sweep(measurements, scales)} if scales else measure(measurements)
    if args.json:
        write_whole(args.json, json.dumps(_conditions(args) | result, indent=2) + "\n")
    failed = [bar["name"] for bar in result.get("bars", []) if bar["passed"] is False]
    if failed:
        print(f"{len(failed)} bar(s) FAILED: {', '.join(failed)}")
    return 1 if failed else 0
