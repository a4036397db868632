"""How much a prompt asks for: its number of requirements, and a level made of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

COMPLEXITIES = ("simple", "mixed", "full")


# Words that name nothing to be seen, or only that a picture is wanted.
_FUNCTION_WORDS = frozenset(
    "a an the and or of in on at to by for from with without as is are was were be being been it its his her their "
    "this that these those there which who whose while has have had photo photograph picture image painting "
    "drawing".split()
)
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def count_content_words(prompt: str) -> int:
    """Content words of a free-text prompt: an estimate of its requirements where no structure is published."""
    return sum(word.lower() not in _FUNCTION_WORDS for word in _WORD.findall(prompt))


def text_complexity(words: int) -> str:
    """Level of a free-text prompt by its content words: simple up to 3, mixed up to 7, full beyond."""
    return COMPLEXITIES[(words > 3) + (words > 7)]


def structured_complexity(objects: int, num_requirements: int) -> str:
    """Level of a prompt with a published meaning.

    Simple: one object, whatever is said about it; mixed: several objects and at most 3 requirements; full: 4 or more.
    GenEval's single objects and colours are simple, two objects and positions mixed, colour attribution full.
    """
    return COMPLEXITIES[0 if objects <= 1 else 1 + (num_requirements > 3)]


def count_requirements(include: Sequence[Mapping[str, Any]]) -> int:
    """Requirements of GenEval's ``include`` clauses, counted as the embedded world counts its own.

    Every object is one, its colour another; a relation is one.
    """
    objects = sum(clause["count"] * (1 + ("color" in clause)) for clause in include)
    return objects + sum("position" in clause for clause in include)
