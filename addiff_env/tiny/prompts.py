"""Captions of the embedded world and their meaning.

The prompt categories mirror GenEval's tasks (Ghosh, Hajishirzi & Schmidt 2023) plus scenes of three and four objects.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {  # sRGB, 0-255; hues at least 24 degrees apart so that `checker` can tell them
    "red": (222, 36, 44),
    "orange": (243, 135, 28),
    "yellow": (244, 222, 40),
    "green": (48, 174, 66),
    "cyan": (48, 204, 214),
    "blue": (44, 86, 222),
    "purple": (142, 60, 204),
    "pink": (248, 104, 186),
}
SIZES = {"small": (6.8, 7.8), "large": (10.4, 12.4)}  # radius ranges, pixels
RELATION_AXES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # x or y, direction
RELATIONS = tuple(RELATION_AXES)
NUMBERS = {"two": 2, "three": 3, "four": 4}
CATEGORIES = (
    "single_object",
    "two_objects",
    "counting",
    "colors",
    "position",
    "color_attribution",
    "three_objects",
    "four_objects",
)


@dataclass(frozen=True)
class ObjectSpec:
    """What a prompt asks of one kind of object; None leaves the attribute open."""

    shape: str
    color: str | None = None
    size: str | None = None
    count: int = 1

    def phrase(self) -> str:
        """The words for it, e.g. ``a small red circle`` or ``three stars``."""
        noun = self.shape if self.count == 1 else _plural(self.shape)
        attributes = " ".join(word for word in (self.size, self.color, noun) if word)
        if self.count > 1:
            return f"{_number_word(self.count)} {attributes}"
        return f"{'an' if attributes[0] in 'aeiou' else 'a'} {attributes}"


@dataclass(frozen=True)
class Prompt:
    """A caption of the world and its meaning; ``relation`` holds between the first two objects."""

    category: str
    objects: tuple[ObjectSpec, ...]
    relation: str | None = None

    @property
    def caption(self) -> str:
        """The text, e.g. ``a red circle left of a blue square``."""
        phrases = [spec.phrase() for spec in self.objects]
        if self.relation:
            return f"{phrases[0]} {self.relation} {phrases[1]}"
        if len(phrases) < 3:
            return " and ".join(phrases)
        return f"{', '.join(phrases[:-1])} and {phrases[-1]}"

    @property
    def complexity(self) -> int:
        """Number of requirements on a picture: objects, attributes and relations."""
        of_objects = sum(s.count * (1 + (s.color is not None) + (s.size is not None)) for s in self.objects)
        return of_objects + (self.relation is not None)


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _number_word(count: int) -> str:
    return next(word for word, value in NUMBERS.items() if value == count)


# --------------------------------------------------------------------------- reading captions


def parse_caption(caption: str) -> Prompt:
    """Read a caption of the world back into its meaning (the inverse of `Prompt.caption`).

    Raises:
        ValueError: the text is not a caption of this world; the message quotes what was not understood.
    """
    text = " ".join(caption.lower().split()).rstrip(".")
    for relation in RELATIONS:
        left, found, right = text.partition(f" {relation} ")
        if found:
            return with_category((_parse_object(left, caption), _parse_object(right, caption)), relation)
    parts = re.split(r", and |, | and ", text)
    return with_category(tuple(_parse_object(part, caption) for part in parts), None)


def _parse_object(phrase: str, caption: str) -> ObjectSpec:
    article, *words = phrase.split() or [""]
    count = 1 if article in ("a", "an", "one") else NUMBERS.get(article)
    shapes = {name: name for name in SHAPES} if count == 1 else {_plural(name): name for name in SHAPES}
    if count is None or not words or words[-1] not in shapes:
        raise ValueError(f"not a caption of the embedded world: {phrase!r} in {caption!r}")
    *attributes, noun = words
    size = attributes.pop(0) if attributes and attributes[0] in SIZES else None
    color = attributes.pop(0) if attributes and attributes[0] in COLORS else None
    if attributes:
        raise ValueError(f"not a caption of the embedded world: {attributes[0]!r} in {caption!r}")
    return ObjectSpec(shapes[noun], color, size, count)


def with_category(objects: tuple[ObjectSpec, ...], relation: str | None) -> Prompt:
    """The prompt that asks for ``objects``; its category follows from them."""
    return Prompt(_category(objects, relation), objects, relation)


def _category(objects: tuple[ObjectSpec, ...], relation: str | None) -> str:
    if relation:
        return "position"
    if any(spec.count > 1 for spec in objects):
        return "counting"
    if len(objects) == 1:
        return "colors" if objects[0].color else "single_object"
    if len(objects) == 2:
        return "color_attribution" if all(spec.color for spec in objects) else "two_objects"
    return "three_objects" if len(objects) == 3 else "four_objects"


# --------------------------------------------------------------------------- drawing at random


def sample_prompt(rng: np.random.Generator, category: str) -> Prompt:
    """Draw a prompt of one of `CATEGORIES`.

    Raises:
        ValueError: unknown category.
    """
    if category not in CATEGORIES:
        raise ValueError(f"unknown category {category!r}; known: {', '.join(CATEGORIES)}")
    shapes = [str(s) for s in rng.permutation(SHAPES)]
    colors = [str(c) for c in rng.permutation(list(COLORS))]
    relation: str | None = None
    if category == "single_object":
        objects: tuple[ObjectSpec, ...] = (ObjectSpec(shapes[0], None, _maybe_size(rng)),)
    elif category == "colors":
        objects = (ObjectSpec(shapes[0], colors[0], _maybe_size(rng)),)
    elif category == "counting":
        color = colors[0] if rng.random() < 0.7 else None
        objects = (ObjectSpec(shapes[0], color, None, int(rng.integers(2, 5))),)
    elif category == "two_objects":
        objects = tuple(ObjectSpec(shapes[i], None, _maybe_size(rng)) for i in range(2))
    elif category == "position":
        colored = rng.random() < 0.75
        objects = tuple(ObjectSpec(shapes[i], colors[i] if colored else None) for i in range(2))
        relation = str(rng.choice(RELATIONS))
    else:
        number = {"color_attribution": 2, "three_objects": 3, "four_objects": 4}[category]
        picks = rng.integers(len(SHAPES), size=number)  # a shape may come twice, a colour may not
        objects = tuple(ObjectSpec(SHAPES[k], colors[i]) for i, k in enumerate(picks))
    return Prompt(category, objects, relation)


def _maybe_size(rng: np.random.Generator) -> str | None:
    return None if rng.random() < 0.4 else str(rng.choice(list(SIZES)))
