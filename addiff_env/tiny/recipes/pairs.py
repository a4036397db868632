"""Pictures with captions for the models that look at them (CLIP, DINO, reward): what was drawn, previews, samples.

Every picture comes with its objects, (N, 6, 5) float32 rows of x, y, shape, color, size (indices; shape -1 is an
empty row), from which `grid_targets` makes a dense target: learning *what is where* first teaches these small models
in minutes what contrast with captions alone would take hours to.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from addiff_env.storage.commands import command_line
from addiff_env.storage.files import replacing
from addiff_env.tiny.checker import Found
from addiff_env.tiny.hard_negatives import hard_negative
from addiff_env.tiny.prompt_splits import sample_train_prompt
from addiff_env.tiny.prompts import CATEGORIES, COLORS, SHAPES, ObjectSpec, parse_caption
from addiff_env.tiny.recipes import data
from addiff_env.tiny.scenes import SIZE, SIZE_BOUNDARY, Scene, sample_scene

MAX_OBJECTS = 6
PATCH = 8  # pixels; dense targets are on an 8x8 grid
_SHAPE_NAMES = (*SHAPES, "unknown")
_COLOR_NAMES = list(COLORS)
_NOUNS = {ObjectSpec(shape, count=count).phrase().split()[-1] for shape in SHAPES for count in (1, 2)}
_CLASSES = (1 + len(_SHAPE_NAMES), len(COLORS), 2)  # classes of shape (0: nothing centred here), color, size


def describe(objects: Scene | tuple[Found, ...]) -> np.ndarray:
    """Rows (6, 5) of a scene's drawn objects or of those the checker found."""
    rows = np.full((MAX_OBJECTS, 5), -1, np.float32)
    items: Sequence[Any] = objects.objects if isinstance(objects, Scene) else objects
    for row, item in zip(rows, items, strict=False):  # a seventh object is beyond every prompt
        large = item.radius >= SIZE_BOUNDARY
        row[:] = item.x, item.y, _SHAPE_NAMES.index(item.shape), _COLOR_NAMES.index(item.color), large
    return rows


def scene_objects(work: Path, captions: list[str], seed: int) -> torch.Tensor:
    """Objects (N, 6, 5) of the training pictures, drawn again from `data.prepare`'s stream and kept in ``work``.

    Raises:
        ValueError: the training set was rendered with another seed or by another version.
    """
    path = work / "objects.npy"
    if path.exists() and len(kept := np.load(path)) == len(captions):
        return torch.from_numpy(kept)
    rows = np.empty((len(captions), MAX_OBJECTS, 5), np.float32)
    for start in range(0, len(captions), data._CHUNK):
        rng = np.random.default_rng((seed, start // data._CHUNK))
        for row in range(start, start + data._CHUNK):
            prompt = sample_train_prompt(rng, str(rng.choice(CATEGORIES, p=data.SHARES)))
            if prompt.caption != captions[row]:
                raise ValueError(f"picture {row} of {work} is {captions[row]!r}, seed {seed} gives {prompt.caption!r}")
            rows[row] = describe(sample_scene(rng, prompt))
    with replacing(path) as partial, partial.open("wb") as file:
        np.save(file, rows)
    return torch.from_numpy(rows)


@dataclass
class Pairs:
    """Pictures (N, 64, 64, 3) uint8, their captions and their objects (N, 6, 5)."""

    pictures: torch.Tensor
    captions: list[str]
    objects: torch.Tensor

    def take(self, index: torch.Tensor) -> Pairs:
        """The rows of ``index``."""
        return Pairs(self.pictures[index], [self.captions[i] for i in index.tolist()], self.objects[index])

    def __add__(self, other: Pairs) -> Pairs:
        """One after the other."""
        return Pairs(
            torch.cat([self.pictures, other.pictures]),
            self.captions + other.captions,
            torch.cat([self.objects, other.objects]),
        )


def load_scenes(work: Path, seed: int) -> Pairs:
    """The clean training pictures (memory-mapped)."""
    pictures, captions = data.load(work)
    return Pairs(pictures, captions, scene_objects(work, captions, seed))


def load_previews(work: Path, scenes: Pairs) -> Pairs:
    """The pool that `generate.previews` made of ``scenes``.

    Raises:
        FileNotFoundError: it was not made yet.
    """
    path = work / "previews.npz"
    if not path.exists():
        raise FileNotFoundError(f"{path}; run: {_generating(work)}")
    with np.load(path) as pool:
        index, pictures = torch.from_numpy(pool["index"]), torch.from_numpy(pool["pictures"])
    return Pairs(pictures, [scenes.captions[i] for i in index.tolist()], scenes.objects[index])


@dataclass
class Samples:
    """What the diffusion model generated: the decoded x0 at some steps, the finished picture last."""

    pictures: torch.Tensor  # (N, K, 64, 64, 3) uint8
    captions: list[str]
    objects: torch.Tensor  # (N, 6, 5), what the checker found in the finished picture
    satisfied: torch.Tensor  # (N,) bool, whether it passes the checker
    shares: tuple[float, ...]  # (K,) of the schedule done when the picture was decoded

    def take(self, index: torch.Tensor) -> Samples:
        """The rows of ``index``."""
        captions = [self.captions[i] for i in index.tolist()]
        return Samples(self.pictures[index], captions, self.objects[index], self.satisfied[index], self.shares)


def load_samples(work: Path) -> Samples:
    """All complete chunks that `generate.samples` wrote, in order.

    Raises:
        FileNotFoundError: there are none.
    """
    paths = sorted((work / "samples").glob("chunk_*.npz"))
    if not paths:
        raise FileNotFoundError(f"{work / 'samples' / 'chunk_*.npz'}; run: {_generating(work)}")
    chunks = [dict(np.load(path)) for path in paths]
    stacked = {key: torch.from_numpy(np.concatenate([c[key] for c in chunks])) for key in ("pictures", "objects")}
    return Samples(
        stacked["pictures"],
        [str(prompt) for chunk in chunks for prompt in chunk["prompt"]],
        stacked["objects"],
        torch.from_numpy(np.concatenate([chunk["satisfied"] for chunk in chunks])),
        tuple(json.loads((work / "samples" / "config.json").read_text())["shares"]),
    )


# --------------------------------------------------------------------------- augmentation and targets


def shift_and_mirror(pairs: Pairs, generator: torch.Generator) -> Pairs:
    """Shift whole pictures by up to two pixels and mirror half of those that no caption word contradicts."""
    batch = len(pairs.captions)
    shift = torch.randint(-2, 3, (batch, 2), generator=generator)  # x, y
    sided = torch.tensor([" left of " in caption or " right of " in caption for caption in pairs.captions])
    mirror = (torch.rand(batch, generator=generator) < 0.5) & ~sided
    place = torch.arange(SIZE)
    rows = place - shift[:, 1:]
    # Column c shows source column 63 - (c - dx) of a mirrored picture, so x becomes 64 - x + dx there.
    columns = torch.where(mirror[:, None], SIZE - 1 - (place - shift[:, :1]), place - shift[:, :1])
    moved = pairs.pictures[
        torch.arange(batch)[:, None, None], rows.clamp(0, SIZE - 1)[:, :, None], columns.clamp(0, SIZE - 1)[:, None]
    ]
    objects = pairs.objects.clone()
    sign = torch.where(mirror, -1, 1)[:, None]
    objects[..., 0] = sign * objects[..., 0] + mirror[:, None] * SIZE + shift[:, :1]
    objects[..., 1] += shift[:, 1:]
    return Pairs(moved, pairs.captions, objects)


def grid_targets(objects: torch.Tensor) -> torch.Tensor:
    """Classes (B, 64, 3) of shape (0: no centre in this cell), color and size, of objects (B, 6, 5)."""
    cells = SIZE // PATCH
    targets = torch.full((len(objects), cells * cells, 3), -100)
    targets[..., 0] = 0
    row, slot = (objects[..., 2] >= 0).nonzero(as_tuple=True)
    found = objects[row, slot]
    cell = (found[:, :2] / PATCH).long().clamp(0, cells - 1)
    classes = found[:, 2:].long()
    classes[:, 0] += 1
    targets[row, cell[:, 1] * cells + cell[:, 0]] = classes
    return targets


class Detector(nn.Module):
    """A linear read-out of what is centred in each picture token; it serves training only and is not shipped."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, sum(_CLASSES))

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of tokens (B, 64, width) against `grid_targets`; empty cells weigh less."""
        parts = self.head(self.norm(tokens)).float().split(_CLASSES, -1)
        weight = tokens.new_ones(_CLASSES[0], dtype=torch.float32)
        weight[0] = 0.1
        weights = (weight, None, None)
        return sum(
            F.cross_entropy(part.flatten(0, 1), targets[..., i].flatten(), weight=weights[i])
            for i, part in enumerate(parts)
        )


def word_targets(captions: list[str], objects: torch.Tensor, length: int) -> torch.Tensor:
    """What each caption token says of the picture, (B, length, 2); -1 where it says nothing.

    First, at a color or shape word: something of that color or shape is there. Second, at a shape word:
    as many objects as its phrase counts are there with all its attributes.
    """
    targets = torch.full((len(captions), length, 2), -1.0)
    for row, (caption, found) in enumerate(zip(captions, objects.numpy(), strict=True)):
        shapes, colors, larges = found[found[:, 2] >= 0, 2:].T.astype(int)
        words = re.findall(r"[a-z]+|,", caption)
        phrases = iter(parse_caption(caption).objects)
        for place, word in enumerate(words, 1):  # token 0 is the start token
            if word in COLORS:
                targets[row, place, 0] = float(_COLOR_NAMES.index(word) in colors)
            elif word in _NOUNS:
                spec = next(phrases)
                match = shapes == SHAPES.index(spec.shape)
                targets[row, place, 0] = float(match.any())
                match = match & (spec.color is None or colors == _COLOR_NAMES.index(spec.color))
                match = match & (spec.size is None or larges == (spec.size == "large"))
                targets[row, place, 1] = float(match.sum() == spec.count)
    return targets


class Grounder(nn.Module):
    """A linear read-out of `word_targets` from mixed caption tokens; it serves training only and is not shipped."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, 2)

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of tokens (B, L, width) against `word_targets`."""
        known = targets >= 0
        return F.binary_cross_entropy_with_logits(self.head(tokens).float()[known], targets[known])


def shape_counts(captions: list[str]) -> torch.Tensor:
    """How many of each shape a caption asks for, (B, 6)."""
    counts = torch.zeros(len(captions), len(SHAPES), dtype=torch.long)
    for row, caption in enumerate(captions):
        for spec in parse_caption(caption).objects:
            counts[row, SHAPES.index(spec.shape)] += spec.count
    return counts


def negatives(captions: list[str], generator: torch.Generator) -> list[str]:
    """A `hard_negative` of each caption."""
    rng = step_rng(generator)
    return [hard_negative(rng, parse_caption(caption)).caption for caption in captions]


def step_rng(generator: torch.Generator) -> np.random.Generator:
    """A numpy generator seeded by the step's torch generator."""
    return np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))


def needs(args: argparse.Namespace, *parts: str) -> None:
    """Stop with the command to run when a folder that this recipe builds on is missing.

    Raises:
        FileNotFoundError: naming the folder.
    """
    for part in parts:
        if not (args.out / part).is_dir():
            raise FileNotFoundError(f"{args.out / part}; run the autoencoder and diffusion recipes first")


def _generating(work: Path) -> str:
    return command_line("addiff", "world", "train", "generate", "--work", work)
