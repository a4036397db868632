"""Benchmarks: lists of (prompt, seed, category)."""

from __future__ import annotations

from dataclasses import dataclass

from addiff_env.tiny.scenes import balanced, load_split


@dataclass(frozen=True)
class Item:
    """One picture to make: the initial noise of (prompt, seed) is the same for every method."""

    prompt: str
    seed: int
    category: str


def load_benchmark(name: str, limit: int | None = None) -> list[Item]:
    """Load ``tiny-dev`` or ``tiny-test``; ``limit`` keeps the first items, categories in turn.

    Raises:
        ValueError: unknown name, or a limit below 1.
    """
    if name not in ("tiny-dev", "tiny-test"):
        raise ValueError(f"unknown benchmark {name!r}; known: tiny-dev, tiny-test")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    rows = load_split(name.removeprefix("tiny-"))
    chosen = balanced(rows, len(rows) if limit is None else limit)
    return [Item(row["prompt"], row["seed"], row["category"]) for row in chosen]
