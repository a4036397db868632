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
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from addiff_env.env.prompts import (
    READERS,
    PromptRow,
    check_prompt,
    parse_json,
    read_prompts,
    read_utf8,
    shorten,
    split_lines,
)
from addiff_env.storage.paths import resolve_model
from addiff_env.tiny.scenes import load_split, parse_caption

COMPLEXITIES = ("simple", "mixed", "full")
T2I_CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
COCO_NUMBER = 30_000
MAX_SEED = 2**63 - 1  # that an environment takes


@dataclass(frozen=True)
class Item:
    """One picture to make: the initial noise of (prompt, seed) is the same for every method."""

    prompt: str
    seed: int
    category: str
    id: str = ""  # what the list itself calls the prompt: caption id, or number of the line, from 0
    facts: int = 0  # how much a picture must get right, see `text_facts` and `required_facts`
    complexity: str = ""  # one of COMPLEXITIES
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)  # the list's other fields


@dataclass(frozen=True)
class Entry:
    """A prompt as a list states it, before seeds are given out."""

    prompt: str
    category: str
    id: str
    seed: int | None = None
    facts: int | None = None  # None: counted from the words
    complexity: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A public list: where it lies below the data folder, where it comes from, how long it is."""

    paths: tuple[str, ...]  # alternatives, the first one that exists is read
    home: str
    number: int  # prompts, as published
    read: Callable[[Path], list[Entry]]
    images_per_prompt: int = 1  # the benchmark's own protocol
    in_turn: bool = True  # whether categories take turns, so that a limit keeps them balanced


def load_benchmark(
    name: str | os.PathLike[str],
    limit: int | None = None,
    *,
    root: str | Path | None = None,
    images_per_prompt: int | None = None,
    first_seed: int = 0,
    any_length: bool = False,
) -> list[Item]:
    """Load a benchmark by name, or a file of prompts by path.

    Args:
        name: ``tiny-dev``, ``tiny-test``, a name in `SOURCES`, or the path of a file that
            `addiff_env.env.prompts` reads.
        limit: keep the first prompts, categories in turn; None keeps all.
        root: folder of the public lists; by default the environment variable ``ADDIFF_DATA``.
        images_per_prompt: by default the benchmark's own protocol (GenEval 4, T2I-CompBench 10, others 1).
        first_seed: seeds count up from here, one for each picture of the whole list, so that a limit does not move
            them; a list that states its seeds keeps them.
        any_length: accept a public list of another length than the published one.

    Raises:
        ValueError: unknown name, a limit or number of images below 1, a list of another length than published,
            a damaged line, a seed that is no whole number of at least 0, the same (prompt, seed) twice.
        FileNotFoundError: no such file, or the public list is not in the folder; says where it comes from.
    """
    for word, number in (("limit", limit), ("images_per_prompt", images_per_prompt)):
        if number is not None and number < 1:
            raise ValueError(f"{word} must be at least 1, got {number}")
    name = os.fspath(name)
    source = SOURCES.get(name)
    groups = _give_seeds(
        _entries(name, root, any_length), images_per_prompt or (source.images_per_prompt if source else 1), first_seed
    )
    if source is None or source.in_turn:
        groups = categories_in_turn(groups)
    items = [item for group in groups[:limit] for item in group]
    _refuse_repeats(name, items)
    return items


def known_benchmarks() -> tuple[str, ...]:
    """Names that `load_benchmark` takes beside file paths."""
    return ("tiny-dev", "tiny-test", *SOURCES)


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
    if name in ("tiny-dev", "tiny-test"):
        return _read_tiny(name.removeprefix("tiny-"))
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
        [_item(entry, index * images + k, first_seed, k) for k in range(images)] for index, entry in enumerate(entries)
    ]


def _item(entry: Entry, index: int, first_seed: int, repeat: int) -> Item:
    seed = first_seed + index if entry.seed is None else _derived_seed(entry.seed, repeat)
    facts = text_facts(entry.prompt) if entry.facts is None else entry.facts
    level = entry.complexity or text_complexity(facts)
    return Item(entry.prompt, seed, entry.category, entry.id, facts, level, entry.metadata)


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


# --------------------------------------------------------------------------- complexity

# Words that name nothing to be seen, or only that a picture is wanted.
_FUNCTION_WORDS = frozenset(
    "a an the and or of in on at to by for from with without as is are was were be being been it its his her their "
    "this that these those there which who whose while has have had photo photograph picture image painting "
    "drawing".split()
)
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def text_facts(prompt: str) -> int:
    """Content words of a free-text prompt: an estimate of the number of facts where no structure is published."""
    return sum(word.lower() not in _FUNCTION_WORDS for word in _WORD.findall(prompt))


def text_complexity(words: int) -> str:
    """Level of a free-text prompt by its content words: simple up to 3, mixed up to 7, full beyond."""
    return COMPLEXITIES[(words > 3) + (words > 7)]


def structured_complexity(objects: int, facts: int) -> str:
    """Level of a prompt with a published meaning.

    Simple: one object, whatever is said about it; mixed: several objects and at most 3 facts; full: 4 facts or more.
    GenEval's single objects and colours are simple, two objects and positions mixed, colour attribution full.
    """
    return COMPLEXITIES[0 if objects <= 1 else 1 + (facts > 3)]


def required_facts(include: Sequence[Mapping[str, Any]]) -> int:
    """Facts of GenEval's ``include`` clauses, counted as the embedded world counts its own.

    Every object is one, its colour another; a relation is one.
    """
    objects = sum(clause["count"] * (1 + ("color" in clause)) for clause in include)
    return objects + sum("position" in clause for clause in include)


# --------------------------------------------------------------------------- readers


def _read_tiny(split: str) -> list[Entry]:
    entries = []
    for number, row in enumerate(load_split(split)):
        meaning = parse_caption(row["prompt"])
        level = structured_complexity(sum(spec.count for spec in meaning.objects), meaning.complexity)
        entries.append(Entry(row["prompt"], row["category"], str(number), row["seed"], meaning.complexity, level))
    return entries


def read_list(path: Path) -> list[Entry]:
    """Any file that `addiff_env.env.prompts` reads, by the name of its kind.

    Columns or names ``seed`` and ``category`` (or ``tag``), where there are any, are the entry's own, the rest becomes
    metadata.

    Raises:
        FileNotFoundError, ValueError: as `read_prompts`; or a seed or category that is none, with its place.
    """
    return [_entry(row, path.stem) for row in read_prompts(path)]


def _entry(row: PromptRow, default_category: str) -> Entry:
    seed, category = row.fields.get("seed"), row.fields.get("category") or row.fields.get("tag") or default_category
    seed = None if seed in (None, "") else _stated_seed(seed, row.place)
    category = check_prompt(str(category), f"{row.place}: a category")
    rest = {key: value for key, value in row.fields.items() if key not in ("seed", "category")}
    return Entry(row.prompt, category, str(row.index), seed, metadata=rest)


def read_captions(path: Path) -> list[Entry]:
    """One caption a line, blank ones included, as the empty prompt of category ``blank``.

    The published list numbers its pictures by line, and some of MS-COCO's captions end in a line feed.
    """
    rows = [(number, line.strip()) for number, line in enumerate(split_lines(read_utf8(path)))]
    return [Entry(line, "caption" if line else "blank", str(number)) for number, line in rows]


def _stated_seed(seed: Any, place: str) -> int:
    """An integer or its digits: rounding anything else would give two entries the noise of one."""
    digits = str(seed).strip()
    if not digits.isdecimal() or len(digits) > 100 or int(digits) > MAX_SEED:
        raise ValueError(
            f"{place}: expected a whole number as seed, got {shorten(seed)}; it must be 0 or more, below 2**63"
        )
    return int(digits)


def read_geneval(path: Path) -> list[Entry]:
    """GenEval's ``evaluation_metadata.jsonl``; metadata keeps ``tag``, ``include``, ``exclude`` and ``prompt``."""
    return [_structured(entry, path) for entry in read_list(path)]


def _structured(entry: Entry, path: Path) -> Entry:
    include = entry.metadata.get("include")
    if not include or not _is_include(include) or "tag" not in entry.metadata:
        raise ValueError(f"{path}:{int(entry.id) + 1}: no GenEval metadata: {dict(entry.metadata)!r}")
    facts = required_facts(include)
    level = structured_complexity(sum(clause["count"] for clause in include), facts)
    metadata = {**entry.metadata, "prompt": entry.prompt}
    return Entry(entry.prompt, entry.category, entry.id, entry.seed, facts, level, metadata)


def _is_include(clauses: Any) -> bool:
    """Whether these are objects of GenEval, each with its class and how many of it there are to be."""
    return isinstance(clauses, list) and all(
        isinstance(clause, dict) and "class" in clause and type(clause.get("count")) is int and clause["count"] > 0
        for clause in clauses
    )


def read_t2i_compbench(folder: Path) -> list[Entry]:
    """T2I-CompBench's validation prompts, ``<category>_val.txt`` for each of `T2I_CATEGORIES`.

    Where the benchmark's ``complex_val_spatial.txt`` and ``complex_val_action.txt`` lie beside them, metadata says
    under ``relations`` which a complex prompt has: ``spatial``, ``action`` or ``both``.
    """
    relations = _complex_relations(folder)
    entries = []
    for category in T2I_CATEGORIES:
        path = folder / f"{category}_val.txt"
        if not path.is_file():
            raise FileNotFoundError(f"T2I-CompBench: no {path}; from {SOURCES['t2i-compbench'].home}")
        for e in read_list(path):
            stated = {"relations": relations(e.prompt)} if relations and category == "complex" else {}
            entries.append(Entry(e.prompt, category, f"{category}/{e.id}", metadata=stated))
    return entries


def _complex_relations(folder: Path) -> Callable[[str], str] | None:
    """Which relations a complex prompt has, by the benchmark's lists; None where they are not there."""
    paths = [folder / f"complex_val_{kind}.txt" for kind in ("spatial", "action")]
    if not all(path.is_file() for path in paths):
        return None
    spatial, action = ({_plain(entry.prompt) for entry in read_list(path)} for path in paths)
    return lambda prompt: "spatial" if _plain(prompt) in spatial else "action" if _plain(prompt) in action else "both"


def _plain(prompt: str) -> str:
    """As the benchmark's script compares prompts: up to the full stop, in lower case."""
    return prompt.split(".")[0].lower()


def read_coco(path: Path, number: int = COCO_NUMBER, seed: int = 0) -> list[Entry]:
    """Choose ``number`` pictures of ``captions_val2014.json`` and one caption of each.

    Captions and pictures are ordered by the SHA-256 of ``<seed>:<id>``, and the first are taken: the choice is the same
    on every machine and with every library version, and any beginning of it is a random sample.

    Raises:
        ValueError: no annotations, one without its numbers or caption, or fewer pictures than wanted.
    """
    annotations = _annotations(path)
    captions: dict[int, dict[str, Any]] = {}  # per picture, the one of the smallest hash
    for row in sorted(annotations, key=lambda row: _lot(seed, row["id"])):
        captions.setdefault(row["image_id"], row)
    if len(captions) < number:
        raise ValueError(f"{path}: captions of {len(captions)} pictures, wanted {number}")
    chosen = sorted(captions, key=lambda image: _lot(seed, image))[:number]
    return [_caption(captions[image]) for image in chosen]


def _annotations(path: Path) -> list[dict[str, Any]]:
    """The captions of a ``captions_val2014.json``, each with its numbers; raises as `read_coco`."""
    content = parse_json(read_utf8(path), path)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not annotations or not isinstance(annotations, list):
        raise ValueError(f"{path}: no 'annotations'; expected captions_val2014.json")
    for index, row in enumerate(annotations):
        place = f"{path}: annotation {index + 1}"
        if not isinstance(row, dict) or not all(type(row.get(name)) is int for name in ("id", "image_id")):
            raise ValueError(f"{place}: expected whole numbers as id and image_id, got {shorten(row)}")
        if not isinstance(row.get("caption"), str):
            raise ValueError(f"{place}: expected a caption, got {shorten(row)}")
        check_prompt(row["caption"], f"{place}: a caption")
    return annotations


def _lot(seed: int, number: int) -> bytes:
    return hashlib.sha256(f"{seed}:{number}".encode()).digest()


def _caption(row: Mapping[str, Any]) -> Entry:
    prompt = " ".join(row["caption"].split())  # some captions hold line feeds
    return Entry(prompt, "caption", str(row["id"]), metadata={"image_id": row["image_id"]})


SOURCES: dict[str, Source] = {
    "coco-30k": Source(
        ("coco/captions_val2014.json", "coco/annotations/captions_val2014.json"),
        "http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
        COCO_NUMBER,
        read_coco,
    ),
    "coco-8k": Source(
        ("coco/coco_8k_captions.txt", "coco/coco.txt"),
        "https://github.com/openai/dalle3-eval-samples (prompts)",
        8213,
        read_captions,
        in_turn=False,
    ),
    "drawbench": Source(
        ("drawbench/drawbench.txt",), "https://github.com/openai/dalle3-eval-samples (prompts)", 200, read_list
    ),
    "partiprompts": Source(
        ("partiprompts/PartiPrompts.tsv",),
        "https://raw.githubusercontent.com/google-research/parti/main/PartiPrompts.tsv",
        1632,
        read_list,
    ),
    "geneval": Source(
        ("geneval/evaluation_metadata.jsonl",),
        "https://github.com/djghosh13/geneval (prompts/evaluation_metadata.jsonl)",
        553,
        read_geneval,
        images_per_prompt=4,
    ),
    "t2i-compbench": Source(
        ("t2i_compbench",),
        "https://github.com/Karine-Huang/T2I-CompBench (examples/dataset/*_val.txt)",
        2400,
        read_t2i_compbench,
        images_per_prompt=10,
    ),
}
