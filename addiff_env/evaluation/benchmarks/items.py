"""Benchmarks: lists of prompts, each with the seed of its initial noise.

One loader, `load_benchmark`, and one row type, `Item`. The embedded world's splits are part of the package; the public
lists are read from a folder (argument ``root`` or environment variable ``ADDIFF_DATA``), laid out as `SOURCES` says
(`addiff_env.evaluation.benchmarks.download` fills it);
any file of prompts that `addiff_env.env.prompts` reads can be named by its path.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol, TypeVar

from addiff_env.env.prompts import READERS
from addiff_env.evaluation.benchmarks.complexity import count_content_words, text_complexity
from addiff_env.evaluation.benchmarks.readers import SOURCES, Entry, Source, read_list, read_tiny
from addiff_env.loading.paths import resolve_model
from addiff_env.tiny.prompt_splits import SPLITS

TINY = tuple(f"tiny-{split}" for split in SPLITS)  # the embedded world's splits


@dataclass(frozen=True)
class Item:
    """One picture to make: the initial noise of (prompt, seed) is the same for every method."""

    prompt: str
    seed: int
    category: str
    id: str = ""  # what the list itself calls the prompt: caption id, or number of the line, from 0
    num_requirements: int = 0  # on a picture, see `count_content_words` and `count_requirements`
    complexity: str = ""  # one of COMPLEXITIES
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)  # the list's other fields


def load_benchmark(name: str | os.PathLike[str], limit: int | None = None, **protocol: Any) -> list[Item]:
    """The items of `load_prompts`; the first ``limit`` prompts' only, categories in turn, where that is not None.

    Raises:
        ValueError: a limit below 1; and as `load_prompts`.
    """
    check_number("limit", limit)
    return [item for group in load_prompts(name, **protocol)[:limit] for item in group]


def load_prompts(
    name: str | os.PathLike[str],
    *,
    root: str | Path | None = None,
    images_per_prompt: int | None = None,
    first_seed: int = 0,
    any_length: bool = False,
) -> list[list[Item]]:
    """Load a benchmark by name, or a file of prompts by path: the pictures of each prompt, categories in turn.

    Args:
        name: ``tiny-dev``, ``tiny-test``, ``tiny-final``, a name in `SOURCES`, or the path of a file that
            `addiff_env.env.prompts` reads.
        root: folder of the public lists; by default the environment variable ``ADDIFF_DATA``.
        images_per_prompt: by default the benchmark's own protocol (GenEval 4, T2I-CompBench 10, others 1).
        first_seed: seeds count up from here, one for each picture of the whole list, so that a limit does not move
            them; a list that states its seeds keeps them.
        any_length: accept a public list of another length than the published one.

    Raises:
        ValueError: unknown name, a number of images that is none, a list of another length than published,
            a damaged line, a seed that is no whole number of at least 0, the same (prompt, seed) twice.
        FileNotFoundError: no such file, or the public list is not in the folder; says where it comes from.
    """
    check_number("images_per_prompt", images_per_prompt)
    name = os.fspath(name)
    source = SOURCES.get(name)
    images = images_per_prompt or (source.images_per_prompt if source else 1)
    groups = _give_seeds(_entries(name, root, any_length), images, first_seed)
    if source is None or source.in_turn:
        groups = categories_in_turn(groups)
    _refuse_repeats(name, [item for group in groups for item in group])
    return groups


def check_number(name: str, value: Any) -> None:
    """Check that a limit, or another number of things, is None or a whole number of at least 1.

    Raises:
        ValueError: it is not.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
        raise ValueError(f"{name} must be a whole number of at least 1, or null, got {value!r}")


def known_benchmarks() -> tuple[str, ...]:
    """Names that `load_benchmark` takes beside file paths."""
    return (*TINY, *SOURCES)


def id_list_hash(items: Iterable[Item]) -> str:
    """SHA-256 of the items' ids, prompts and seeds in order: two runs with the same hash used the same list."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.id, item.prompt, item.seed]).encode() + b"\n")
    return digest.hexdigest()


def benchmark_record(name: str, items: Sequence[Item]) -> dict[str, Any]:
    """What a run notes about its benchmark."""
    return {"benchmark": name, "items": len(items), "id_list_sha256": id_list_hash(items)}


def _entries(name: str, root: str | Path | None, any_length: bool) -> list[Entry]:
    if name in TINY:
        return read_tiny(name.removeprefix("tiny-"))
    if name in SOURCES:
        source = SOURCES[name]
        path = _find(name, source, root)
        return _checked(source.read(path), source, path, any_length)
    if Path(name).suffix.lower() not in READERS:
        known = ", ".join(known_benchmarks())
        raise ValueError(f"unknown benchmark {name!r}; known: {known}, or a file: {', '.join(READERS)}")
    return read_list(Path(name))


def _find(name: str, source: Source, root: str | Path | None) -> Path:
    folder = root or os.environ.get("ADDIFF_DATA")
    wanted = f"{name} needs {' or '.join(source.paths)} from {source.home} (addiff download {name} <folder>)"
    if not folder:
        raise FileNotFoundError(f"{wanted}, below a folder named by `root` or the environment variable ADDIFF_DATA")
    for relative in source.paths:
        if (path := Path(resolve_model(folder), relative)).exists():
            return path
    raise FileNotFoundError(f"{wanted}; not found below {os.path.abspath(folder)!r}")


def _checked(entries: list[Entry], source: Source, path: Path, any_length: bool) -> list[Entry]:
    if len(entries) != source.number and not any_length:
        raise ValueError(
            f"{path} has {len(entries)} prompts, the published list has {source.number}: a cut download or another "
            f"version; from {source.home} (any_length=True accepts it, of evaluate.py benchmark.any_length=true)"
        )
    return entries


def _give_seeds(entries: Sequence[Entry], images: int, first_seed: int) -> list[list[Item]]:
    """The pictures of each prompt. A stated seed is the first picture's; further ones are derived from it."""
    return [
        [item_of(entry, index * images + k, first_seed, k) for k in range(images)]
        for index, entry in enumerate(entries)
    ]


def item_of(entry: Entry, index: int, first_seed: int, repeat: int) -> Item:
    """The ``repeat``-th picture of a prompt, ``index``-th of its list; its seed is the stated one, or counted up."""
    seed = first_seed + index if entry.seed is None else _derived_seed(entry.seed, repeat)
    number = count_content_words(entry.prompt) if entry.num_requirements is None else entry.num_requirements
    level = entry.complexity or text_complexity(number)
    return Item(entry.prompt, seed, entry.category, entry.id, number, level, entry.metadata)


def _derived_seed(seed: int, repeat: int) -> int:
    if repeat == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{repeat}".encode()).digest()[:4], "big")


class Categorised(Protocol):
    """Whatever belongs to a category: an item, or a row."""

    @property
    def category(self) -> str:
        """Name of the category."""


C = TypeVar("C", bound=Categorised)


def categories_in_turn(groups: Sequence[list[C]]) -> list[list[C]]:
    """Reorder prompts so that their categories take turns; within a category the order stays."""
    rank: dict[str, int] = {}
    turns = []
    for group in groups:
        category = group[0].category
        turns.append(rank.get(category, 0))
        rank[category] = turns[-1] + 1
    order = {category: k for k, category in enumerate(rank)}
    keyed = sorted(range(len(groups)), key=lambda k: (turns[k], order[groups[k][0].category]))
    return [groups[k] for k in keyed]


def _refuse_repeats(name: str, items: Sequence[Item]) -> None:
    seen: set[tuple[str, int]] = set()
    for item in items:
        if (place := (item.prompt, item.seed)) in seen:
            raise ValueError(f"{name}: prompt {item.prompt!r} with seed {item.seed} is listed twice")
        seen.add(place)
