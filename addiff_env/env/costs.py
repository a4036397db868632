"""What looking costs: FLOPs and milliseconds of every encoder, scorer and preview decoder, next to a denoiser step.

``addiff profile`` lists the embedded world's models. ``--id`` names another environment, ``--set`` changes
its settings, and ``--clip``, ``--dino``, ``--scorer`` (each any number of times) add further models::

    addiff profile --set guidance_scale=1 --lanes 4
    addiff profile --scorer imagereward --scorer hps --clip open_clip:ViT-L-14/openai --json costs.json
    addiff profile --memory
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from addiff_env.diffusion.backbones import Backbone, count_flops, initial_noise, load_backbone
from addiff_env.env.config import EnvConfig
from addiff_env.env.validation import preset_of
from addiff_env.loading.paths import resolve_model
from addiff_env.loading.weights import resolve_device, resolve_dtype
from addiff_env.perception.encoders import load_clip, load_dino
from addiff_env.perception.previews import PREVIEWS, Previewer, make_previewer
from addiff_env.perception.scorers import load_scorer, reads_latents
from addiff_env.storage.files import told_when_full

PROMPT = "a red circle left of a blue square"
STEP = "denoiser step"


@dataclass(frozen=True)
class Cost:
    """One component's cost of one lane."""

    component: str
    model: str  # the setting it was opened with
    per: str  # what it is paid for: step, look, prompt or picture
    flops: float  # floating-point operations
    milliseconds: float  # wall-clock, of a batch divided by its lanes


def best_seconds(
    call: Callable[[], Any], device: torch.device | str = "cpu", repeats: int = 5, warmups: int = 2
) -> float:
    """Wall-clock seconds of the fastest of ``repeats`` calls, after ``warmups``; waits for the GPU."""
    cuda = torch.device(device).type == "cuda"
    times = []
    for _ in range(warmups + repeats):
        started = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[warmups:])


class Meter:
    """Measures calls on one device, ``lanes`` at a time."""

    def __init__(self, device: torch.device, lanes: int, repeats: int) -> None:
        self.device, self.lanes, self.repeats = device, lanes, repeats

    def cost(self, name: str, model: str, per: str, call: Callable[[int], Any], flops: float | None = None) -> Cost:
        """The cost of ``call``, a function of how many lanes it serves; ``flops`` of one are counted if not given."""
        if flops is None:
            call(1)  # what is cached once per prompt is no part of a look
            flops = count_flops(lambda: call(1), self.device)
        seconds = best_seconds(lambda: call(self.lanes), self.device, self.repeats)
        return Cost(name, model, per, flops, 1000 * seconds / self.lanes)

    def text_cost(self, name: str, model: str, encode: Callable[[str], Any], flops: float | None = None) -> Cost:
        """The cost of reading one prompt; ``encode`` sees another string each time, so that no cache answers."""
        texts = (PROMPT + " " * number for number in count())  # the same tokens
        if flops is None:
            flops = count_flops(lambda: encode(next(texts)), self.device)
        return Cost(name, model, "prompt", flops, 1000 * best_seconds(lambda: encode(next(texts)), self.device))


@torch.no_grad()
def measure(
    config: EnvConfig,
    clips: Sequence[str] = (),
    dinos: Sequence[str] = (),
    scorers: Sequence[str] = (),
    lanes: int = 16,
    repeats: int = 5,
) -> list[Cost]:
    """The costs of an environment's models, and of further encoders and scorers by their settings.

    Raises:
        FileNotFoundError, ValueError: a model is missing or damaged, or a setting unknown; the message shows it.
    """
    if lanes < 1 or repeats < 1:
        raise ValueError(f"lanes and repeats must be at least 1, got {lanes} and {repeats}")
    backbone = load_backbone(**config.backbone_settings)
    meter = Meter(backbone.device, lanes, repeats)
    rows = list(_backbone_costs(meter, backbone, config))
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(lanes, 3, config.height, config.width, generator=generator).to(backbone.device)
    for setting in dict.fromkeys([config.clip, *clips]):
        rows += _clip_costs(meter, setting, pictures)
    for setting in dict.fromkeys([config.dino, *dinos]):
        rows.append(_dino_cost(meter, setting, pictures))
    for setting in dict.fromkeys([config.scorer, *scorers]):
        rows += _scorer_costs(meter, setting, pictures, backbone.dtype)
    return rows


def _backbone_costs(meter: Meter, backbone: Backbone, config: EnvConfig) -> Iterator[Cost]:
    shape = backbone.latent_shape(config.height, config.width)
    schedule = backbone.schedule(config.num_inference_steps, shape, config.solver, config.eta)
    latents = initial_noise(backbone, shape, range(meter.lanes))
    conditioning = backbone.encode_prompts([PROMPT] * meter.lanes, config.negative_prompt)

    def step(lanes: int) -> None:
        which = torch.arange(lanes, device=backbone.device)
        at = torch.zeros_like(which)
        levels = schedule.current.at(at)
        backbone.predict(latents[which], schedule.timesteps[at], levels, conditioning[which], config.guidance_scale)

    def decode(previewer: Previewer, lanes: int) -> None:
        previewer.decode(latents[:lanes])

    passes = backbone.passes(config.guidance_scale)
    yield meter.cost(STEP, config.model, "step", step, passes * backbone.flops("denoiser", shape))
    yield meter.text_cost(
        "its text encoder", config.model, lambda text: backbone.encode_prompts([text]), backbone.flops("text", shape)
    )
    for kind in PREVIEWS:
        if kind != "taesd" or config.preview_model:
            previewer = make_previewer(kind, backbone, config.preview_model)
            model = str(config.preview_model if kind == "taesd" else config.model)
            name = "full decode (preview vae)" if kind == "vae" else f"preview {kind}"
            yield meter.cost(name, model, "picture", partial(decode, previewer), previewer.flops(shape))


def _clip_costs(meter: Meter, setting: str, pictures: torch.Tensor) -> list[Cost]:
    clip = load_clip(resolve_model(setting), str(meter.device))
    return [
        meter.cost("CLIP, picture", setting, "look", lambda lanes: clip.image_features(pictures[:lanes])),
        meter.text_cost("CLIP, text", setting, clip.encode_text),
    ]


def _dino_cost(meter: Meter, setting: str, pictures: torch.Tensor) -> Cost:
    dino = load_dino(resolve_model(setting), str(meter.device))
    return meter.cost("DINO", setting, "look", lambda lanes: dino.image_features(pictures[:lanes]))


def _scorer_costs(meter: Meter, setting: str, pictures: torch.Tensor, dtype: torch.dtype) -> list[Cost]:
    scorer: Any = load_scorer(setting, str(meter.device))
    if reads_latents(scorer):
        latents = torch.zeros(meter.lanes, *scorer.latent_shape, device=meter.device, dtype=dtype)
        asked = torch.ones(meter.lanes, 2, dtype=torch.long, device=meter.device)
        return [
            meter.cost(
                "scorer, latents",
                setting,
                "look",
                lambda n: scorer.score_latents(latents[:n], [PROMPT] * n, asked[:n, 0], asked[:n]),
            )
        ]
    rows = [meter.cost("scorer", setting, "look", lambda n: scorer.score(pictures[:n], [PROMPT] * n))]
    reader = getattr(scorer, "text_encoder", None)
    if reader is not None:
        rows.append(meter.text_cost("scorer, text", setting, reader.encode_text))
    return rows


# --------------------------------------------------------------------------- the command


def table(rows: Sequence[Cost]) -> str:
    """All costs as text, one a line, with their size relative to a denoiser step."""
    step = next(row for row in rows if row.component == STEP)
    cells = [("component", "per", "GFLOPs", "of a step", "ms", "of a step", "model")]
    for row in rows:
        shares = (row.flops / step.flops, row.milliseconds / step.milliseconds)
        cells.append(
            (
                row.component,
                row.per,
                f"{row.flops / 1e9:.4g}",
                f"{100 * shares[0]:.1f}%",
                f"{row.milliseconds:.3g}",
                f"{100 * shares[1]:.1f}%",
                row.model,
            )
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="addiff profile", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--id", default="AdDiffusion-Tiny-v0", help="environment whose models are measured")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of it, as JSON")
    for name in ("clip", "dino", "scorer"):
        parser.add_argument(f"--{name}", action="append", default=[], help=f"a further {name} setting")
    parser.add_argument("--lanes", type=int, help="pictures a call works on (default: batch_size, at most 16)")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls; the fastest counts")
    parser.add_argument("--json", metavar="FILE", help="also write the list there ('-': print it instead of the table)")
    parser.add_argument(
        "--memory", action="store_true", help="instead of measuring: expected peak memory of the ids of the Hub"
    )
    options = parser.parse_args(argv)
    if options.memory:
        from addiff_env.env.footprint import memory_table

        print(memory_table())
        return 0
    settings = preset_of(options.id) | dict(map(_read_setting, options.set))
    config = _resolved(EnvConfig(**settings))
    lanes = min(16, config.batch_size) if options.lanes is None else options.lanes
    report = {
        "id": options.id,
        "size": [config.height, config.width],
        "device": _device_name(config.device),
        "dtype": config.dtype,
        "lanes": lanes,
    }
    if options.json not in (None, "-"):
        Path(options.json).touch()  # a place that cannot be written to is refused before anything is measured
    rows = measure(config, options.clip, options.dino, options.scorer, lanes, options.repeats)
    report["costs"] = [asdict(row) for row in rows]
    if options.json != "-":
        place = f"{report['device']}, {config.dtype}"
        print(f"{options.id}, {config.height} x {config.width}, {place}, {lanes} lanes a call\n")
        print(table(rows))
    if options.json:
        text = json.dumps(report, indent=2) + "\n"
        with told_when_full(Path(options.json)):
            sys.stdout.write(text) if options.json == "-" else Path(options.json).write_text(text)
    return 0


def _read_setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value  # a plain string


def _resolved(config: EnvConfig) -> EnvConfig:
    """The settings with the device and the dtype that ``auto`` stands for."""
    device = resolve_device(config.device)
    return replace(config, device=device, dtype=resolve_dtype(config.dtype, device))


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads"
