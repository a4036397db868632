"""Settings strings to scorers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from addiff_env.loading.paths import looked_at, resolve_model
from addiff_env.loading.weights import shared
from addiff_env.perception.encoders import load_clip
from addiff_env.perception.scorers.base import Scorer
from addiff_env.perception.scorers.clip_based import CLIP_BASED, CLIPScore
from addiff_env.perception.scorers.image_reward import ImageReward
from addiff_env.perception.scorers.joint import stored_model_type
from addiff_env.perception.scorers.latent_text import LatentTextReward, load_latent_text_reward
from addiff_env.perception.scorers.pixel_text import load_pixel_text_reward

LOADERS: dict[str, Any] = {"imagereward": ImageReward.from_checkpoint, **CLIP_BASED}


@shared
def load_scorer(setting: str, device: str = "cpu") -> Scorer:
    """The shared scorer of a setting on ``device``; `addiff_env.perception.scorers` lists the forms.

    Raises:
        FileNotFoundError: weights that are not there; the message says what to download.
        ValueError: damaged or foreign weights (with the offending keys), or an unknown option.
    """
    name, _, rest = setting.partition(":")
    if name == "clipscore":
        if not rest:
            raise ValueError("'clipscore' needs a CLIP setting, e.g. 'clipscore:open_clip:ViT-L-14/openai'")
        return CLIPScore(load_clip(resolve_model(rest), device))
    if name not in LOADERS:
        folder = resolve_model(setting)
        if not Path(folder).is_dir():
            known = ", ".join([*LOADERS, "clipscore:<CLIP setting>"])
            raise FileNotFoundError(
                f"no scorer {looked_at(setting)}: expected {known} or a PixelTextReward's or LatentTextReward's folder"
            )
        if stored_model_type(folder) == LatentTextReward.model_type:
            return load_latent_text_reward(folder, device)
        return load_pixel_text_reward(folder, device)
    path, options = read_options(setting, rest)
    return LOADERS[name](path, device=device, **options)


def read_options(setting: str, rest: str) -> tuple[str | None, dict[str, str]]:
    """Path and options of what follows the scorer's name."""
    known = [name for name in inspect.signature(LOADERS[setting.partition(":")[0]]).parameters][2:]
    parts = [part for part in rest.split(",") if part]
    path = parts.pop(0) if parts and "=" not in parts[0] else None
    options = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if name not in known or not equals or not value:
            raise ValueError(f"cannot read {part!r} in {setting!r}; known options: {', '.join(known) or 'none'}")
        options[name] = value
    return path, options
