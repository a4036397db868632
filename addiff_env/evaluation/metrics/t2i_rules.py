"""T2I-CompBench's rules, as pure functions: what a prompt asks for, and how well detections and depths meet it.

`t2i_compbench` says where they differ from the benchmark's own scripts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.metrics.detectors import Detection
from addiff_env.evaluation.metrics.phrases import NounPhrase, counted_noun, noun_phrases

SIDE = 479  # the scripts' pictures have this shorter side; distances are in its pixels
PHRASES = 8  # noun phrases asked for at most

RELATIONS = (  # in the order in which the script looks for them
    "on side of",
    "next to",
    "near",
    "on the left of",
    "on the right of",
    "on the bottom of",
    "on the top of",
    "on top of",
)
COMPLEX_RELATIONS = ("on top of", "on bottom of", "on the left", "on the right", "next to", "on side of", "near")
DEPTH_RELATIONS = ("in front of", "behind", "hidden")  # in the order in which the script looks for them
_PERSONS = dict.fromkeys(("girl", "boy", "man", "woman"), "person")
_COUNTED = {  # names of counted objects; the scripts of places rename persons alone
    **_PERSONS,
    "ship": "boat",
    "television": "tv",
    "telivision": "tv",
    "goldfish": "fish",
    "painting": "picture",
}
_LIST = re.compile(r"\s*(?:,|,?\s*and)\s*")  # what separates the objects of one


def relation_score(relation: str | None, a: Sequence[float], b: Sequence[float]) -> float:
    """How well box ``a`` stands in ``relation`` to box ``b``, in [0, 1]; boxes in pixels of a picture of side `SIDE`.

    *Next to*: nearer than 150 pixels along either axis, else 150 by the longer distance. The other four: on that side,
    along the longer axis of the offset; boxes that overlap by an IoU of .1 or more get .1 / IoU. *On top of* (without
    *the*) is never satisfied, as in the script.
    """
    right = (b[0] + b[2] - a[0] - a[2]) / 2  # from a's centre to b's
    down = (b[1] + b[3] - a[1] - a[3]) / 2
    if relation in ("next to", "on side of", "near"):
        return 1.0 if min(abs(right), abs(down)) < 150 else 150 / max(abs(right), abs(down))
    sideways, vertical = abs(right) > abs(down), abs(down) > abs(right)
    holds = {
        "on the right of": sideways and right < 0,
        "on the left of": sideways and right > 0,
        "on the bottom of": vertical and down < 0,
        "on the top of": vertical and down > 0,
    }.get(relation or "", False)
    overlap = _overlap(a, b)
    return 0.0 if not holds else 1.0 if overlap < 0.1 else 0.1 / overlap


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes; 0 where both are empty."""
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union else 0.0


def spatial_score(detections: Sequence[Detection], objects: tuple[str, str] | None, relation: str | None) -> float:
    """A quarter of each object's confidence and half the relation's score; below .5 it is 0.

    Args:
        detections: most confident first; the first of a label counts.
        objects: what has to stand in ``relation``, in its order; None where the prompt does not say.
        relation: one of `RELATIONS`.
    """
    if objects is None:
        return 0.0
    first = [next((found for found in detections if found.label == name), None) for name in objects]
    score = sum(0.25 * found.score for found in first if found)
    one, other = first
    if one and other:
        score += relation_score(relation, one.box, other.box) / 2
    return score if score >= 0.5 else 0.0


def depth_relation_score(relation: str | None, a: Sequence[float], b: Sequence[float], nearness: np.ndarray) -> float:
    """How well box ``a`` stands in front of box ``b``, or *behind* or *hidden* by it, in [0, 1].

    0 where what ``a`` holds is not nearer (or farther) on average; else the boxes' IoU by .5, at most 1: one thing
    hides another only where it covers it.

    Args:
        relation: one of `DEPTH_RELATIONS`.
        a: left, top, right, bottom in pixels of ``nearness``.
        b: the same of the other.
        nearness: (h, w), larger is nearer.
    """
    one, other = (_inside(nearness, box) for box in (a, b))
    if relation not in DEPTH_RELATIONS or not one.size or not other.size:
        return 0.0
    nearer = float(one.mean() - other.mean())
    holds = nearer > 0 if relation == "in front of" else nearer < 0
    return min(1.0, _overlap(a, b) / 0.5) if holds else 0.0


def _inside(values: np.ndarray, box: Sequence[float]) -> np.ndarray:
    left, top, right, bottom = (max(0, int(edge)) for edge in box)
    return values[top:bottom, left:right]


def depth_score(
    detections: Sequence[Detection], objects: tuple[str, str] | None, relation: str | None, nearness: np.ndarray
) -> float:
    """A quarter of each object's confidence and half the relation's score.

    Args:
        detections: most confident first, boxes in pixels of ``nearness``.
        objects: what has to stand in ``relation``, in its order; parts of a label count. None: the prompt does not say.
        relation: one of `DEPTH_RELATIONS`.
        nearness: (h, w), larger is nearer.
    """
    one, other = _first_of(detections, objects) if objects else (None, None)
    score = sum(0.25 * found.score for found in (one, other) if found)
    if one and other:
        score += depth_relation_score(relation, one.box, other.box, nearness) / 2
    return score


def _first_of(detections: Sequence[Detection], objects: tuple[str, str]) -> list[Detection | None]:
    """The detection of each object: as in the script the last one before both have been seen, or the first of one."""
    chosen: list[Detection | None] = [None, None]
    for found in detections:
        chosen = [found if name in found.label else before for name, before in zip(objects, chosen, strict=True)]
        if all(chosen):
            return chosen
    return [next((found for found in detections if name in found.label), None) for name in objects]


def numeracy_score(detections: Sequence[Detection], wanted: Sequence[tuple[str, int]]) -> float:
    """Every object's equal share: half of it for being there, half for being there so many times.

    Detections of a label that cover another by more than nine tenths count once. An object that is no label counts as
    every label that contains it ("fish" as "goldfish").

    Raises:
        ValueError: nothing is wanted.
    """
    if not wanted:
        raise ValueError("a numeracy prompt must name at least one object with its number")
    labels = [found.label for found in _distinct(detections)]
    score = 0.0
    for name, number in wanted:
        if name not in labels:
            labels = [name if name in label else label for label in labels]
        score += 0.5 * (name in labels) + 0.5 * (name in labels and labels.count(name) == number)
    return score / len(wanted)


def _distinct(detections: Sequence[Detection]) -> list[Detection]:
    kept: list[Detection] = []
    for found in detections:
        if not any(found.label == other.label and _covers(found.box, other.box) for other in kept):
            kept.append(found)
    return kept


def _covers(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether the boxes, border pixels included, overlap by more than .9 of their union or of either."""
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1) * max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return any(shared / area > 0.9 for area in (*areas, sum(areas) - shared))


# --------------------------------------------------------------------------- prompts


def questions(prompt: str) -> list[str]:
    """What BLIP is asked: each noun phrase of the prompt with a question mark."""
    return [f"{phrase.text}?" for phrase in noun_phrases(prompt)[:PHRASES]]


def spatial_demand(prompt: str) -> tuple[tuple[str, str] | None, str | None]:
    """The first and the last object of a prompt such as "a cat on the left of a dog", and their relation."""
    names = [_name(phrase.head) for phrase in noun_phrases(prompt)]
    relation = next((words for words in RELATIONS if words in prompt), None)
    return ((names[0], names[-1]) if len(names) > 1 else None), relation


def depth_demand(prompt: str) -> tuple[tuple[str, str] | None, str | None]:
    """The first and the last object of a prompt such as "a cat hidden by a dog", and their relation."""
    objects, _ = spatial_demand(prompt)
    return objects, next((words for words in DEPTH_RELATIONS if words in prompt), None)


def complex_demand(prompt: str) -> tuple[tuple[str, str] | None, str | None]:
    """The objects before and behind the one relation of a longer prompt; no objects where there is not exactly one."""
    lowered, phrases = prompt.lower(), noun_phrases(prompt)
    places = sorted((lowered.find(words), words) for words in COMPLEX_RELATIONS if words in lowered)
    relation = next((words for words in RELATIONS if words in lowered), None)
    if len(places) != 1:
        return None, relation
    at, words = places[0]
    before = [phrase for phrase in phrases if phrase.end <= at]
    behind = [phrase for phrase in phrases if phrase.end > at + len(words)]
    return ((_name(before[-1].head), _name(behind[0].head)) if before and behind else None), relation


def numeracy_demand(prompt: str) -> list[tuple[str, int]]:
    """The counted objects of a prompt: "two dogs and a traffic light" is (dog, 2) and (traffic light, 1).

    An article counts as *one* in the list that the prompt opens with. The script looks objects up in a vocabulary,
    which lacks what an article names behind a verb or a preposition: "six people gathered for a picnic".
    """
    phrases = noun_phrases(prompt)
    listed = [
        phrase for phrase in phrases[: _opening(prompt, phrases)] if phrase.text.split()[0].lower() in ("a", "an")
    ]
    wanted = [phrase for phrase in phrases if phrase.counted or phrase in listed]
    return [(_object(phrase), phrase.number) for phrase in wanted]


def _opening(prompt: str, phrases: Sequence[NounPhrase]) -> int:
    """How many phrases there are before something else than a comma or an *and* stands between two."""
    between = (prompt[one.end : other.end - len(other.text)] for one, other in pairwise(phrases))
    return next((at for at, text in enumerate(between, 1) if not _LIST.fullmatch(text)), len(phrases))


def _object(phrase: NounPhrase) -> str:
    name = counted_noun(phrase)
    return _COUNTED.get(name, name)


def _name(noun: str) -> str:
    return _PERSONS.get(noun.lower(), noun.lower())


_DEMANDS = {"spatial": spatial_demand, "3d_spatial": depth_demand, "complex": complex_demand}


def objects_of(item: Item) -> list[str]:
    """The objects that a detector is asked for in a picture of ``item``: those of its own prompt alone."""
    if item.category == "numeracy":
        return list(dict.fromkeys(name for name, _ in numeracy_demand(item.prompt)))
    if item.category not in _DEMANDS:
        return []
    objects, _ = _DEMANDS[item.category](item.prompt)
    return list(dict.fromkeys(objects or ()))
