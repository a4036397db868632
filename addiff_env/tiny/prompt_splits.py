"""The prompt splits: which captions belong to train, dev and test, and the shipped rows of dev and test."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from addiff_env.tiny.prompts import CATEGORIES, Prompt, sample_prompt

WORLD_VERSION = 1  # part of every split; bump whenever a caption or a split could change


def caption_split(prompt: Prompt) -> str:
    """``train``, ``dev`` or ``test``: where this prompt's meaning belongs (80/10/10 by hash).

    Captions that differ only in the order of their objects fall into the same split.
    """
    if prompt.category == "single_object":
        return "train"  # too few of them: they occur in every split
    specs = [f"{s.count} {s.size} {s.color} {s.shape}" for s in prompt.objects]
    if prompt.relation is None:
        specs.sort()
    key = f"v{WORLD_VERSION}|{'|'.join(specs)}|{prompt.relation}"
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 10
    return {0: "dev", 1: "test"}.get(bucket, "train")


def sample_train_prompt(rng: np.random.Generator, category: str | None = None) -> Prompt:
    """Draw a prompt that belongs to no evaluation split; a random category by default."""
    while True:
        prompt = sample_prompt(rng, category or str(rng.choice(CATEGORIES)))
        if caption_split(prompt) == "train":
            return prompt


def build_split(name: str, per_category: int = 128) -> list[dict[str, Any]]:
    """Make an evaluation split anew: rows of ``prompt``, ``seed``, ``category``, balanced.

    Raises:
        ValueError: ``name`` is neither ``dev`` nor ``test``.
    """
    if name not in ("dev", "test"):
        raise ValueError(f"unknown split {name!r}; known: dev, test")
    rows = []
    for category in CATEGORIES:
        entropy = hashlib.sha256(f"v{WORLD_VERSION}|{name}|{category}".encode()).digest()[:8]
        rng = np.random.default_rng(int.from_bytes(entropy, "big"))
        wanted = "train" if category == "single_object" else name
        prompts: list[Prompt] = []
        while len(prompts) < per_category:
            prompt = sample_prompt(rng, category)
            if caption_split(prompt) == wanted:
                prompts.append(prompt)
        base = 1_000_000 * (1 + ("dev", "test").index(name)) + 1_000 * CATEGORIES.index(category)
        rows += [{"prompt": prompt.caption, "seed": base + i, "category": category} for i, prompt in enumerate(prompts)]
    return rows


@cache
def load_split(name: str) -> tuple[dict[str, Any], ...]:
    """The shipped evaluation split ``dev`` or ``test``: rows of ``prompt``, ``seed``, ``category``.

    Raises:
        ValueError: unknown split.
    """
    path = resources.files("addiff_env.tiny") / "splits" / f"{name}.jsonl"
    if not path.is_file():
        raise ValueError(f"unknown split {name!r}; known: dev, test")
    return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def balanced(rows: tuple[dict[str, Any], ...], number: int) -> list[dict[str, Any]]:
    """The first ``number`` rows of a split, taken from its categories in turn."""
    by_category = {c: [row for row in rows if row["category"] == c] for c in CATEGORIES}
    turns = [by_category[c][i] for i in range(max(map(len, by_category.values()))) for c in CATEGORIES]
    return turns[:number]
