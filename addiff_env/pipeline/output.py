"""What a call returns, and pictures in the forms that diffusers' pipelines give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image

from addiff_env.types import Generated

OUTPUT_TYPES = ("pil", "np", "pt")


@dataclass
class AdaptivePipelineOutput(BaseOutput):
    """Pictures in the order of the prompts, and one value per picture of everything else.

    Attributes:
        images: a list of PIL pictures; or float32 in [0, 1], an array (N, H, W, 3) or a tensor (N, 3, H, W).
        nfe: denoiser evaluations (a guidance pair is one).
        net_flops: everything spent on the picture, looks and policy included.
        seconds: wall-clock, that of a step shared equally by the lanes that it moved.
        actions: decisions as carried out: 0 continue, 1 stop, 2 refine.
        reward_score: the reward model's score of the picture.
        prompts, seeds: what it was made of. Of a picture whose noise came from a generator that had been drawn from
            before, the seed alone does not give it again.
        notes: "" or what is wrong with it.
        price: of an evaluation, where it was asked for at one.
        previews: on demand, the previews that the decisions were made at, each as `images` are.
        masks: on demand, one float32 (h, w) in [0, 1] a refinement, at the latents' size.
    """

    images: Any
    nfe: list[int]
    net_flops: list[float]
    seconds: list[float]
    actions: list[list[int]]
    reward_score: list[float]
    prompts: list[str]
    seeds: list[int]
    notes: list[str]
    price: list[float | None]
    previews: list[list[Any]] | None = None
    masks: list[list[np.ndarray]] | None = None


@dataclass
class GeneratedImage:
    """One finished picture, with the values of an `AdaptivePipelineOutput`; ``index`` is its place among them."""

    index: int
    image: Any
    prompt: str
    seed: int
    nfe: int
    net_flops: float
    seconds: float
    actions: list[int]
    reward_score: float
    note: str
    price: float | None
    previews: list[Any]
    masks: list[np.ndarray]
    fault: bool = False  # the model's numbers stopped being finite
    forward_passes: int = 0  # network passes (a guidance pair is two)

    @classmethod
    def of(cls, index: int, made: Generated, output_type: str) -> GeneratedImage:
        """``made`` with its pictures in the form ``output_type``."""
        image, previews = converted(made.picture, output_type), [converted(one, output_type) for one in made.previews]
        values = {field.name: getattr(made, field.name) for field in fields(cls) if hasattr(made, field.name)}
        return cls(**values | {"index": index, "image": image, "previews": previews})


def gathered(
    made: Sequence[GeneratedImage], output_type: str, size: tuple[int, int], previews: bool, masks: bool
) -> AdaptivePipelineOutput:
    """The output of pictures in their order, each of ``size`` (height, width)."""
    same = ("nfe", "net_flops", "seconds", "actions", "reward_score", "price")
    columns = {name: name for name in same} | {"prompts": "prompt", "seeds": "seed", "notes": "note"}
    columns |= {"previews": "previews"} if previews else {}
    columns |= {"masks": "masks"} if masks else {}
    values = {name: [getattr(one, source) for one in made] for name, source in columns.items()}
    return AdaptivePipelineOutput(images=stacked([one.image for one in made], output_type, size), **values)


def check_output_type(output_type: str) -> str:
    """``output_type`` if it is one of `OUTPUT_TYPES`; else ValueError."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    return output_type


def converted(picture: np.ndarray, output_type: str) -> Any:
    """A picture uint8 (H, W, 3) as a PIL one, or as float32 in [0, 1]: an array (H, W, 3) or a tensor (3, H, W)."""
    if output_type == "pil":
        return Image.fromarray(picture)
    scaled = picture.astype(np.float32) / 255
    return scaled if output_type == "np" else torch.from_numpy(scaled).permute(2, 0, 1).contiguous()


def stacked(images: list[Any], output_type: str, size: tuple[int, int]) -> Any:
    """Pictures as one batch, where they are arrays or tensors."""
    if output_type == "np":
        return np.stack(images) if images else np.zeros((0, *size, 3), np.float32)
    if output_type == "pt":
        return torch.stack(images) if images else torch.zeros(0, 3, *size)
    return images
