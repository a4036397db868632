"""Wrong captions: prompts that no picture of a given prompt satisfies."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from addiff_env.tiny.prompt_splits import caption_split
from addiff_env.tiny.prompts import COLORS, NUMBERS, SHAPES, ObjectSpec, Prompt, with_category

_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def hard_negative(rng: np.random.Generator, prompt: Prompt) -> Prompt:
    """A prompt that no picture of ``prompt`` satisfies: one attribute, count, relation or object changed.

    A training prompt's negative is again a training prompt, so that no evaluation caption leaks.
    """
    edits = [edit for edit in _EDITS if edit(rng, prompt) is not None]
    negatives = (edits[int(rng.integers(len(edits)))](rng, prompt) for _ in range(1000))
    keeps_split = caption_split(prompt) == "train"
    return next(n for n in negatives if n is not None and not (keeps_split and caption_split(n) != "train"))


def _edited(prompt: Prompt, changes: dict[int, ObjectSpec]) -> Prompt:
    objects = tuple(changes.get(i, spec) for i, spec in enumerate(prompt.objects))
    return with_category(objects, prompt.relation)


def _pick(rng: np.random.Generator, choices: Any) -> Any:
    choices = list(choices)
    return choices[int(rng.integers(len(choices)))]


def _edit_color(rng: np.random.Generator, prompt: Prompt) -> Prompt | None:
    # A colour that the prompt does not have: recolouring can then never give the same objects again.
    used = {spec.color for spec in prompt.objects}
    colored = [i for i, spec in enumerate(prompt.objects) if spec.color]
    if not colored:
        return None
    index = _pick(rng, colored)
    return _edited(prompt, {index: replace(prompt.objects[index], color=_pick(rng, sorted(set(COLORS) - used)))})


def _edit_binding(rng: np.random.Generator, prompt: Prompt) -> Prompt | None:
    """Swap the colours of two different shapes."""
    pairs = [
        (i, j)
        for (i, a), (j, b) in combinations(enumerate(prompt.objects), 2)
        if a.color and b.color and a.color != b.color and a.shape != b.shape
    ]
    if not pairs:
        return None
    i, j = _pick(rng, pairs)
    a, b = prompt.objects[i], prompt.objects[j]
    return _edited(prompt, {i: replace(a, color=b.color), j: replace(b, color=a.color)})


def _edit_shape(rng: np.random.Generator, prompt: Prompt) -> Prompt | None:
    index = int(rng.integers(len(prompt.objects)))
    repeats = len(prompt.objects) > 1 and prompt.category in ("color_attribution", "three_objects", "four_objects")
    used = {prompt.objects[index].shape} if repeats else {spec.shape for spec in prompt.objects}
    new = replace(prompt.objects[index], shape=_pick(rng, sorted(set(SHAPES) - used)))
    return _edited(prompt, {index: new})


def _edit_size(rng: np.random.Generator, prompt: Prompt) -> Prompt | None:
    sized = [i for i, spec in enumerate(prompt.objects) if spec.size]
    if not sized:
        return None
    spec = prompt.objects[index := _pick(rng, sized)]
    return _edited(prompt, {index: replace(spec, size="large" if spec.size == "small" else "small")})


def _edit_count(rng: np.random.Generator, prompt: Prompt) -> Prompt | None:
    if prompt.category != "counting":
        return None
    spec = prompt.objects[0]
    return _edited(prompt, {0: replace(spec, count=_pick(rng, sorted(set(NUMBERS.values()) - {spec.count})))})


def _edit_relation(rng: np.random.Generator, prompt: Prompt) -> Prompt | None:
    # The opposite only: a diagonal arrangement may satisfy two relations.
    return replace(prompt, relation=_OPPOSITE[prompt.relation]) if prompt.relation else None


def _edit_objects(rng: np.random.Generator, prompt: Prompt) -> Prompt | None:
    """Leave one coloured object out, or ask for one more; a picture shows what is asked for and nothing else."""
    if prompt.category not in ("color_attribution", "three_objects", "four_objects"):
        return None
    objects = list(prompt.objects)
    if len(objects) < 4 and rng.random() < 0.5:
        color = _pick(rng, sorted(set(COLORS) - {spec.color for spec in objects}))
        objects.insert(int(rng.integers(len(objects) + 1)), ObjectSpec(_pick(rng, SHAPES), color))
    else:
        objects.pop(int(rng.integers(len(objects))))
    return with_category(tuple(objects), None)


_EDITS = (_edit_color, _edit_binding, _edit_shape, _edit_size, _edit_count, _edit_relation, _edit_objects)
