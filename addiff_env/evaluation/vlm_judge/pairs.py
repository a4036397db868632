"""Pairs of pictures that a judge is asked about, and what its answers in both orders come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

FIRST, SECOND, TIE = "first", "second", "tie"
OUTCOMES = ("a", "tie", "b")  # of a pair: a preferred, neither, b preferred


@dataclass(frozen=True)
class Pair:
    """Two methods' pictures of one prompt and seed."""

    prompt: str
    seed: int
    method_a: str
    method_b: str
    image_a: Path  # PNG or JPEG
    image_b: Path


@dataclass(frozen=True)
class Preference:
    """A judge's answer on a pair, both orders taken together."""

    prompt: str
    seed: int
    method_a: str
    method_b: str
    winner: str | None  # "a", "b", "tie"; None: no usable answer, which is no tie
    consistent: bool  # whether both orders said the same
    judge: str  # the model


def combine_orders(ab: str | None, ba: str | None) -> tuple[str | None, bool]:
    """Winner and consistency from the answers with A first and with B first: a win needs both, all else is a tie.

    None, where one of them is no answer.
    """
    if ab is None or ba is None:
        return None, False
    in_ab = {FIRST: "a", SECOND: "b", TIE: "tie"}[ab]
    in_ba = {FIRST: "b", SECOND: "a", TIE: "tie"}[ba]
    return (in_ab, True) if in_ab == in_ba else ("tie", False)


def pairs_of(pictures: Mapping[str, Mapping[tuple[str, int], Path]], places: Sequence[tuple[str, int]]) -> list[Pair]:
    """Every pair of methods on every (prompt, seed).

    Args:
        pictures: per method, the picture of each (prompt, seed).
        places: (prompt, seed) to judge.

    Raises:
        ValueError: a picture that a method did not keep.
    """
    for method, kept in pictures.items():
        absent = [place for place in places if place not in kept]
        if absent:
            raise ValueError(f"{method!r} has no picture of {len(absent)} places, e.g. {absent[0]}")
    return [
        Pair(prompt, seed, a, b, pictures[a][prompt, seed], pictures[b][prompt, seed])
        for prompt, seed in places
        for a, b in combinations(pictures, 2)
    ]
