"""Time per lane, bytes of the weights, and whether every model loads with its ordinary class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from transformers import AutoModel, CLIPModel

import addiff_env
from addiff_env.diffusion.backbones import Backbone, initial_noise
from addiff_env.env.costs import best_seconds
from addiff_env.loading.weights import quiet_loading
from addiff_env.perception.encoders import CLIPEncoder
from addiff_env.perception.scorers import LatentTextReward, PixelTextReward
from addiff_env.tiny.measures.pictures import early_step, pick
from addiff_env.tiny.prompt_splits import load_split
from addiff_env.tiny.prompts import CATEGORIES
from addiff_env.tiny.scenes import SIZE
from addiff_env.tiny.world import latent_shape

MODELS = ("pipeline", "clip", "dino", "reward", "verifier")
LANES = 16  # batch size of the speed bar


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """PyTorch on ``number`` CPU threads within the block."""
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
