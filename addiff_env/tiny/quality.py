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
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from scipy import ndimage
from tqdm import tqdm
from transformers import AutoModel, CLIPModel, CLIPTokenizer

import addiff_env
from addiff_env.diffusion.backbones import Backbone, Prediction, denoise, initial_noise, load_backbone, to_uint8
from addiff_env.env.costs import best_seconds
from addiff_env.loading.weights import DTYPES, quiet_loading, resolve_dtype
from addiff_env.perception.encoders import CLIPEncoder
from addiff_env.perception.scorers import LatentTextReward, PixelTextReward
from addiff_env.stats import at_least_one, wilson_interval
from addiff_env.tiny.checker import MIN_CHROMA, Found, Verdict, judge, match_objects
from addiff_env.tiny.scenes import (
    CATEGORIES,
    COLORS,
    EXTENT,
    SHAPES,
    SIZE,
    SIZES,
    ObjectSpec,
    Prompt,
    hard_negative,
    load_split,
    parse_caption,
    render,
    sample_prompt,
    sample_scene,
)

WEIGHTS = Path(__file__).resolve().parent / "weights"
MODELS = ("pipeline", "clip", "dino", "reward", "verifier")
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
PREVIEW_REACH = 3  # pixels around a preview's coloured regions
PEAK_SLACK = 2.0  # pixels beyond an object's bounding circle that its attention may peak at
LANES = 16  # batch size of the speed bar
MIB = 2**20
_NOUNS = {ObjectSpec(shape, count=count).phrase().split()[-1] for shape in SHAPES for count in (1, 2)}


# --------------------------------------------------------------------------- bars


@dataclass(frozen=True)
class Bar:
    """One measured number and what is required of it; a bar without ``least`` and ``most`` only informs.

    Shares (``unit`` %) are held as fractions, with the ``n`` cases they were counted over.
    """

    name: str
    measured: float
    least: float | None = None
    most: float | None = None
    unit: str = "%"
    n: int | None = None
    interval: tuple[float, float] | None = None
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the requirement is met; None when there is none. A measurement that is NaN fails."""
        if self.least is None and self.most is None:
            return None
        above = self.least is None or self.measured >= self.least
        return above and (self.most is None or self.measured <= self.most)

    @property
    def required(self) -> str:
        """The requirement in words."""
        if self.least is not None and self.most is not None:
            return f"{self.show(self.least)} to {self.show(self.most)}"
        if self.least is not None:
            return f">= {self.show(self.least)}"
        return "-" if self.most is None else f"<= {self.show(self.most)}"

    def entry(self) -> dict[str, Any]:
        """The bar as JSON has it: NaN becomes None."""
        measured = None if math.isnan(self.measured) else self.measured
        return {**asdict(self), "measured": measured, "required": self.required, "passed": self.passed}

    def show(self, value: float) -> str:
        """A value with the bar's unit."""
        return f"{100 * value:.1f}%" if self.unit == "%" else f"{value:.4g} {self.unit}"


def share(name: str, outcomes: Sequence[bool], least: float | None = None, **extra: Any) -> Bar:
    """The bar of a share of ``outcomes`` that are true; NaN, so failing, when there are none."""
    hits, n = sum(outcomes), len(outcomes)
    return Bar(name, hits / n if n else math.nan, least, n=n, interval=wilson_interval(hits, n) if n else None, **extra)


def worst_share(name: str, by_category: dict[str, list[bool]], least: float) -> Bar:
    """The bar of "at least ``least`` in every category": the share of the worst one, which the note names."""
    worst = min(by_category, key=lambda c: sum(by_category[c]) / len(by_category[c]))
    return share(f"{name}, worst category", by_category[worst], least, note=worst)


def table(bars: Sequence[Bar]) -> str:
    """All bars as text, one a line."""
    rows = [("bar", "required", "measured", "95% interval", "n", "", "")]
    for bar in bars:
        interval = "" if bar.interval is None else " to ".join(bar.show(end) for end in bar.interval)
        verdict = {True: "pass", False: "FAIL", None: "-"}[bar.passed]
        number = "" if bar.n is None else str(bar.n)
        rows.append((bar.name, bar.required, bar.show(bar.measured), interval, number, verdict, bar.note))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


# --------------------------------------------------------------------------- pictures


def pick(rows: Sequence[dict[str, Any]], per_category: int | None) -> list[dict[str, Any]]:
    """The first ``per_category`` rows of each category of a split; None takes all."""
    groups = [[row for row in rows if row["category"] == category][:per_category] for category in CATEGORIES]
    return [row for group in groups for row in group]


def early_step(num_inference_steps: int) -> int:
    """Index of the evaluation that ends the first third of the schedule."""
    return max(1, round(num_inference_steps / 3)) - 1


def latent_shape(backbone: Backbone) -> tuple[int, int, int]:
    """(C, h, w) of the embedded world's latents."""
    return backbone.latent_shape(addiff_env.TINY["height"], addiff_env.TINY["width"])


@dataclass(frozen=True)
class Sample:
    """A generated picture's verdict, and what is looked at along the way."""

    row: dict[str, Any]  # prompt, seed, category
    verdict: Verdict  # of the final picture
    preview: np.ndarray  # (64, 64, 3) uint8, the decoded x0 at one third of the schedule
    early_maps: torch.Tensor  # (tokens, h, w) cross-attention there
    last_maps: torch.Tensor  # (tokens, h, w) cross-attention of the last step


def generate(
    backbone: Backbone, rows: Sequence[dict[str, Any]], steps: int, guidance: float, batch: int = 64
) -> list[Sample]:
    """Generate and judge the pictures of a split's ``rows`` with DDIM."""
    chunks = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    samples: list[Sample] = []
    with tqdm(total=len(chunks) * steps, desc=f"DDIM-{steps}, guidance {guidance:g}") as progress:
        for chunk in chunks:
            samples += _generate_batch(backbone, chunk, steps, guidance, progress)
    return samples


def _generate_batch(
    backbone: Backbone, rows: Sequence[dict[str, Any]], steps: int, guidance: float, progress: tqdm
) -> list[Sample]:
    schedule = backbone.schedule(steps, latent_shape(backbone))
    noise = initial_noise(backbone, latent_shape(backbone), [row["seed"] for row in rows])
    seen: dict[int, Prediction] = {}

    def watch(index: int, latents: torch.Tensor, now: Prediction) -> None:
        if index in looks:
            seen[index] = now
        progress.update()

    looks = (early_step(steps), steps - 1)
    latents = denoise(backbone, schedule, [row["prompt"] for row in rows], noise, guidance, watch, looks)
    early, last = (seen[index] for index in looks)
    pictures, previews = to_uint8(backbone.decode(latents)), to_uint8(backbone.decode(early.x0))
    verdicts = [judge(picture, row["prompt"]) for picture, row in zip(pictures, rows, strict=True)]
    return list(map(Sample, rows, verdicts, previews, early.maps.cpu(), last.maps.cpu()))


def coloured_region(picture: np.ndarray) -> np.ndarray:
    """Where a preview (64, 64, 3) uint8 shows objects: coloured pixels, those near them, and the holes of rings."""
    rgb = picture.astype(np.float64) / 255
    axis = np.arange(-PREVIEW_REACH, PREVIEW_REACH + 1)
    disc = np.add.outer(axis**2, axis**2) <= PREVIEW_REACH**2
    return ndimage.binary_fill_holes(ndimage.binary_dilation(rgb.max(-1) - rgb.min(-1) > MIN_CHROMA, disc))


def foreshadowed(objects: Sequence[Found], region: np.ndarray) -> list[bool]:
    """Which objects of the final picture have their centre in the preview's ``region`` (64, 64) bool."""
    return [bool(region[min(SIZE - 1, int(item.y)), min(SIZE - 1, int(item.x))]) for item in objects]


# --------------------------------------------------------------------------- attention


def object_token_spans(tokenizer: CLIPTokenizer, prompt: str | Prompt) -> list[list[int]]:
    """Per object phrase, in the caption's order, the token positions of its size, colour and noun.

    Positions count the start token as 0, as attention maps do.

    Raises:
        ValueError: a caption that is not of this world.
    """
    prompt = parse_caption(prompt) if isinstance(prompt, str) else prompt
    spans: list[list[int]] = [[]]
    position = 1
    for word in re.findall(r"[a-z]+|,", prompt.caption):
        pieces = len(tokenizer.tokenize(word))
        noun = word in _NOUNS
        if noun or word in SIZES or word in COLORS:
            spans[-1] += range(position, position + pieces)
        if noun:  # a phrase ends with its noun
            spans.append([])
        position += pieces
    return spans[: len(prompt.objects)]


def object_heat(maps: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """Mean (h, w) of some tokens' attention ``maps`` (tokens, h, w), each scaled to a sum of 1."""
    chosen = maps[list(tokens)].double()
    return (chosen / chosen.sum((1, 2), keepdim=True).clamp_min(1e-12)).mean(0)


def peak(heat: torch.Tensor) -> tuple[float, float]:
    """Pixel position (x, y) of the largest value of ``heat`` (h, w) on the picture, bilinearly upsampled.

    Towards the border the upsampled map is flat; the middle of such a plateau is taken.
    """
    full = F.interpolate(heat[None, None], (SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0]
    ys, xs = (full >= full.max() - 1e-9).nonzero(as_tuple=True)
    return float(xs.double().mean()) + 0.5, float(ys.double().mean()) + 0.5


def peaks_inside(heat: torch.Tensor, found: Found) -> bool:
    """Whether ``heat`` (h, w) peaks inside the drawn object, its bounding circle and `PEAK_SLACK` around it."""
    x, y = peak(heat)
    return math.hypot(x - found.x, y - found.y) <= EXTENT[found.shape] * found.radius + PEAK_SLACK


def attention_outcomes(sample: Sample, maps: torch.Tensor, tokenizer: CLIPTokenizer) -> list[bool]:
    """For each object of a satisfied two-object picture, whether its tokens' ``maps`` peak inside it."""
    prompt = parse_caption(sample.row["prompt"])
    pairs = zip(object_token_spans(tokenizer, prompt), match_objects(sample.verdict.objects, prompt), strict=True)
    return [found is not None and peaks_inside(object_heat(maps, tokens), found) for tokens, found in pairs]


# --------------------------------------------------------------------------- speed and size


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def lane_milliseconds(backbone: Backbone, clip: CLIPEncoder) -> float:
    """Milliseconds per lane of one guided evaluation, the preview's decode and CLIP's look at it; batch `LANES`."""
    rows = pick(load_split("test"), LANES // len(CATEGORIES))
    schedule = backbone.schedule(50, latent_shape(backbone))
    conditioning = backbone.encode_prompts([row["prompt"] for row in rows])
    latents = initial_noise(backbone, latent_shape(backbone), [row["seed"] for row in rows])
    at, scale = torch.full((len(rows),), early_step(50), device=backbone.device), addiff_env.TINY["guidance_scale"]

    def look() -> torch.Tensor:
        x0 = backbone.predict(latents, schedule.timesteps[at], schedule.current.at(at), conditioning, scale).x0
        return clip.image_features(backbone.decode(x0))

    return 1000 * best_seconds(look, backbone.device) / len(rows)


def weight_bytes(weights: Path) -> dict[str, int]:
    """Bytes of the safetensors files of each model folder."""
    return {name: sum(file.stat().st_size for file in (weights / name).rglob("*.safetensors")) for name in MODELS}


def loading_problem(name: str, folder: Path) -> str:
    """What goes wrong when a model folder is loaded with its ordinary class; empty when nothing does."""
    if not folder.is_dir():
        return f"no folder {name}"
    try:
        with quiet_loading():
            _LOADERS[name](folder)
    except Exception as error:  # whatever it is, the folder does not simply work
        return f"{name}: {type(error).__name__}: {error}"
    return ""


def _draw(folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red circle", num_inference_steps=2, output_type="np").images[0]
    if picture.shape != (SIZE, SIZE, 3) or not np.isfinite(picture).all():
        raise ValueError(f"drew a picture of shape {picture.shape}, finite: {bool(np.isfinite(picture).all())}")


_LOADERS: dict[str, Callable[[Path], Any]] = {
    "pipeline": _draw,
    "clip": CLIPModel.from_pretrained,
    "dino": AutoModel.from_pretrained,
    "reward": PixelTextReward.from_pretrained,
    "verifier": LatentTextReward.from_pretrained,
}


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
        folder, stride = str(self.args.weights / "pipeline"), addiff_env.TINY["attention_stride"]
        return load_backbone(folder, device=self.args.device, dtype=dtype, attention_stride=stride)

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
        right = [judge(picture, prompt).satisfied for prompt, _, picture in self.scenes]
        refused = [not judge(picture, wrong).satisfied for _, wrong, picture in self.scenes]
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
            raise FileNotFoundError(f"no autoencoder {folder}; train it with: make tiny")
        with quiet_loading():
            vae = AutoencoderTiny.from_pretrained(folder).to(self.args.device)
        pictures = torch.from_numpy(np.stack([picture for _, _, picture in self.scenes]))
        right: list[bool] = []
        for start in range(0, len(pictures), 64):
            inputs = pictures[start : start + 64].to(self.args.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            decoded = to_uint8((vae.decode(vae.encode(inputs).latents).sample / 2 + 0.5).clamp(0, 1))
            prompts = [prompt for prompt, _, _ in self.scenes[start : start + 64]]
            right += [judge(picture, prompt).satisfied for picture, prompt in zip(decoded, prompts, strict=True)]
        groups = self._by_category("re-encoded", [prompt.category for prompt, _, _ in self.scenes], right)
        return [worst_share("autoencoder: re-encoded right", groups, 0.985)]

    def generation(self) -> list[Bar]:
        """Success by category and of all, and the graded score."""
        satisfied = [sample.verdict.satisfied for sample in self.samples]
        groups = self._by_category("generated", [sample.row["category"] for sample in self.samples], satisfied)
        bars = [share(f"generation: {c}", groups[c], LEAST_SUCCESS.get(c)) for c in CATEGORIES]
        score = float(np.mean([sample.verdict.score for sample in self.samples]))
        return [*bars, share("generation: all", satisfied, 0.70, most=0.95, note=f"mean graded score {score:.3f}")]

    def preview(self) -> list[Bar]:
        """Previews at one third of the schedule show where the final objects are."""
        regions = [coloured_region(sample.preview) for sample in self.samples]
        outcomes = [
            shown
            for sample, region in zip(self.samples, regions, strict=True)
            for shown in foreshadowed(sample.verdict.objects, region)
        ]
        note = f"coloured area of the previews: {100 * np.mean(regions):.0f}%"  # what chance would give
        return [share("preview: objects there at 1/3 (our own bar)", outcomes, 0.80, note=note)]

    def speed(self) -> list[Bar]:
        """One guided evaluation, preview and CLIP; the better dtype counts."""
        with quiet_loading():
            clip = CLIPEncoder(str(self.args.weights / "clip"), self.args.device)
        with _threads(2):
            times = {name: lane_milliseconds(self.backbone(name), clip) for name in ("float32", "bfloat16")}
        best = min(times, key=lambda name: times[name])
        where = "2 threads" if self.args.device == "cpu" else self.args.device
        bars = [Bar(f"speed: {name}", value, unit="ms", note=where) for name, value in times.items()]
        return [*bars, Bar(f"speed: a lane in a batch of {LANES}", times[best], most=15.0, unit="ms", note=best)]

    def attention(self) -> list[Bar]:
        """Cross-attention of an object's words peaks inside the object, in satisfied two-object pictures."""
        chosen = [s for s in self.samples if s.row["category"] in TWO_OBJECTS and s.verdict.satisfied]
        tokenizer = self.generator.tokenizer
        outcomes = {
            when: [hit for sample in chosen for hit in attention_outcomes(sample, getattr(sample, when), tokenizer)]
            for when in ("early_maps", "last_maps")
        }
        categories = [sample.row["category"] for sample in chosen for _ in range(2)]
        self._by_category("attention at 1/3", categories, outcomes["early_maps"])
        reach = [EXTENT[o.shape] * o.radius + PEAK_SLACK for sample in chosen for o in sample.verdict.objects]
        chance = f"by chance {100 * math.pi * np.mean(np.square(reach)) / SIZE**2:.0f}%" if reach else ""
        return [
            share("attention: peaks in its object at 1/3", outcomes["early_maps"], 0.80, note=chance),
            share("attention: the same at the last step", outcomes["last_maps"]),
        ]

    def size(self) -> list[Bar]:
        """Weights are small, and load with the ordinary classes."""
        sizes = weight_bytes(self.args.weights)
        problems = [loading_problem(name, self.args.weights / name) for name in MODELS]
        faults = "; ".join(filter(None, problems))
        parts = ", ".join(f"{name} {number / MIB:.1f}" for name, number in sizes.items())
        return [
            Bar("size: safetensors of all models", sum(sizes.values()) / MIB, most=40.0, unit="MiB", note=parts),
            Bar("size: folders that load", problems.count(""), least=len(MODELS), unit="folders", note=faults),
        ]


# --------------------------------------------------------------------------- command line


def sweep(measurements: Measurements, scales: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Success per guidance scale: of all prompts, by category, and the mean graded score. Prints as it goes."""
    args = measurements.args
    rows, backbone = pick(load_split(args.split), args.per_category or 16), measurements.backbone(args.dtype)
    results = {}
    for scale in scales:
        samples = generate(backbone, rows, args.steps, scale)
        satisfied = [sample.verdict.satisfied for sample in samples]
        groups = measurements._by_category(f"{scale:g}", [sample.row["category"] for sample in samples], satisfied)
        shares = {category: float(np.mean(group)) for category, group in groups.items()}
        low, high = wilson_interval(sum(satisfied), len(satisfied))
        score = float(np.mean([sample.verdict.score for sample in samples]))
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
    print(f"DDIM-{args.steps} in {args.dtype}, guidance {args.guidance_sweep or args.guidance}, {args.split} split")
    measurements = Measurements(args)
    scales = args.guidance_sweep
    result: dict[str, Any] = {"sweep": sweep(measurements, scales)} if scales else measure(measurements)
    if args.json:
        args.json.write_text(json.dumps(_conditions(args) | result, indent=2) + "\n")
    failed = [bar["name"] for bar in result.get("bars", []) if bar["passed"] is False]
    if failed:
        print(f"{len(failed)} bar(s) FAILED: {', '.join(failed)}")
    return 1 if failed else 0
