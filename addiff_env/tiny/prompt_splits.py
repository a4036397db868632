"""The prompt splits: which captions belong to train, dev, test and final, and the shipped rows of the last three."""

from __future__ import annotations

import hashlib
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from addiff_env.storage.jsonl import read_objects
from addiff_env.tiny.prompts import CATEGORIES, Prompt, parse_caption, sample_prompt

WORLD_VERSION = 1  # part of every split; bump whenever a caption or a split could change
FOLDER = Path(__file__).resolve().parent / "splits"
SPLITS = ("dev", "test", "final")
# Held-out captions of the other categories are few, and ``dev`` and ``test`` use them up.
FINAL_CATEGORIES = ("position", "color_attribution", "three_objects", "four_objects")


def caption_split(prompt: Prompt) -> str:
    """``train``, ``dev`` or ``test``: where this prompt's meaning belongs (80/10/10 by hash).

    Captions that differ only in the order of their objects fall into the same split.
    """
    if prompt.category == "single_object":
        return "train"  # too few of them: they occur in every split
    bucket = int.from_bytes(hashlib.sha256(_meaning(prompt).encode()).digest()[:4], "big") % 10
    return {0: "dev", 1: "test"}.get(bucket, "train")


def _meaning(prompt: Prompt) -> str:
    """What a prompt asks for, the same whatever the order of unrelated objects."""
    specs = [f"{s.count} {s.size} {s.color} {s.shape}" for s in prompt.objects]
    if prompt.relation is None:
        specs.sort()
    return f"v{WORLD_VERSION}|{'|'.join(specs)}|{prompt.relation}"


def sample_train_prompt(rng: np.random.Generator, category: str | None = None) -> Prompt:
    """Draw a prompt that belongs to no evaluation split; a random category by default."""
    while True:
        prompt = sample_prompt(rng, category or str(rng.choice(CATEGORIES)))
        if caption_split(prompt) == "train":
            return prompt


def build_split(name: str, number: int = 1024) -> list[dict[str, Any]]:
    """Make an evaluation split anew: ``number`` rows of ``prompt``, ``seed``, ``category``, balanced.

    ``dev`` and ``test`` have all `CATEGORIES`. ``final`` has `FINAL_CATEGORIES`, of captions that training leaves out
    and whose meaning occurs in neither of the two; it needs their shipped files.

    Raises:
        ValueError: ``name`` is none of `SPLITS`.
    """
    _check_split(name)
    categories = FINAL_CATEGORIES if name == "final" else CATEGORIES
    rows = []
    for category in categories:
        entropy = hashlib.sha256(f"v{WORLD_VERSION}|{name}|{category}".encode()).digest()[:8]
        rng = np.random.default_rng(int.from_bytes(entropy, "big"))
        prompts: list[Prompt] = []
        while len(prompts) < number // len(categories):
            prompt = sample_prompt(rng, category)
            if _belongs(prompt, name):
                prompts.append(prompt)
        base = 1_000_000 * (1 + SPLITS.index(name)) + 1_000 * CATEGORIES.index(category)
        rows += [{"prompt": prompt.caption, "seed": base + i, "category": category} for i, prompt in enumerate(prompts)]
    return rows


def _belongs(prompt: Prompt, split: str) -> bool:
    if split == "final":
        return caption_split(prompt) != "train" and _meaning(prompt) not in _meanings_in_use()
    return caption_split(prompt) == ("train" if prompt.category == "single_object" else split)


@cache
def _meanings_in_use() -> frozenset[str]:
    """What the captions of ``dev`` and ``test`` mean."""
    return frozenset(_meaning(parse_caption(row["prompt"])) for name in ("dev", "test") for row in load_split(name))


def _check_split(name: str) -> None:
    if name not in SPLITS:
        raise ValueError(f"unknown split {name!r}; known: {', '.join(SPLITS)}")


@cache
def load_split(name: str) -> tuple[dict[str, Any], ...]:
    """A shipped evaluation split, one of `SPLITS`: rows of ``prompt``, ``seed``, ``category``.

    Raises:
        ValueError: unknown split.
    """
    _check_split(name)
    return tuple(read_objects(FOLDER / f"{name}.jsonl"))


def balanced(rows: tuple[dict[str, Any], ...], number: int) -> list[dict[str, Any]]:
    """The first ``number`` rows of a split, taken from its categories in turn."""
    by_category = [[row for row in rows if row["category"] == c] for c in CATEGORIES]
    turns = [row for turn in zip_longest(*by_category) for row in turn if row is not None]
    return turns[:number]
