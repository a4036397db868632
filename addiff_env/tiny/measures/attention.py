"""Does the cross-attention of an object's words peak inside the object?"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import CLIPTokenizer

from addiff_env.tiny.checker import Found, match_objects
from addiff_env.tiny.measures.pictures import Sample
from addiff_env.tiny.prompts import COLORS, SHAPES, SIZES, ObjectSpec, Prompt, parse_caption
from addiff_env.tiny.scenes import EXTENT, SIZE

PEAK_SLACK = 2.0  # pixels beyond an object's bounding circle that its attention may peak at
_NOUNS = {ObjectSpec(shape, count=count).phrase().split()[-1] for shape in SHAPES for count in (1, 2)}


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
    pairs = zip(object_token_spans(tokenizer, prompt), match_objects(sample.result.objects, prompt), strict=True)
    return [found is not None and peaks_inside(object_heat(maps, tokens), found) for tokens, found in pairs]
