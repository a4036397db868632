"""Readers of the published lists of prompts, and where each list is from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from addiff_env.env.prompts import (
    PromptRow,
    check_prompt,
    parse_json,
    read_prompts,
    read_utf8,
    shorten,
    split_lines,
)
from addiff_env.evaluation.benchmarks.complexity import count_requirements, structured_complexity
from addiff_env.tiny.prompt_splits import load_split
from addiff_env.tiny.prompts import parse_caption

T2I_CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
COCO_NUMBER = 30_000
MAX_SEED = 2**63 - 1  # that an environment takes


@dataclass(frozen=True)
class Entry:
    """A prompt as a list states it, before seeds are given out."""

    prompt: str
    category: str
    id: str
    seed: int | None = None
    num_requirements: int | None = None  # None: counted from the words
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


def read_tiny(split: str) -> list[Entry]:
    """A split of the embedded world, one of `addiff_env.tiny.prompt_splits.SPLITS`."""
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
    return [entry_of(row, path.stem) for row in read_prompts(path)]


def entry_of(row: PromptRow, default_category: str) -> Entry:
    """A row of a file with its seed and category; ValueError: one that is none, with its place."""
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
    number = count_requirements(include)
    level = structured_complexity(sum(clause["count"] for clause in include), number)
    metadata = {**entry.metadata, "prompt": entry.prompt}
    return Entry(entry.prompt, entry.category, entry.id, entry.seed, number, level, metadata)


def _is_include(clauses: Any) -> bool:
    """Whether these are objects of GenEval, each with its class and how many of it there are to be."""
    return isinstance(clauses, list) and all(
        isinstance(clause, dict) and "class" in clause and type(clause.get("count")) is int and clause["count"] > 0
        for clause in clauses
    )


def read_geneval2(path: Path) -> list[Entry]:
    """GenEval 2's ``geneval2_data.jsonl``: categories are numbers of atoms, which are the complexity as well.

    Metadata keeps ``vqa_list`` (questions with their answers), ``skills`` (one of each question) and ``atom_count``.

    Raises:
        ValueError: a line without them, with its place.
    """
    return [_atoms(entry, path) for entry in read_list(path)]


def _atoms(entry: Entry, path: Path) -> Entry:
    number, asked, skills = (entry.metadata.get(name) for name in ("atom_count", "vqa_list", "skills"))
    pairs = isinstance(asked, list) and all(
        isinstance(one, list) and len(one) == 2 and all(isinstance(text, str) for text in one) for one in asked
    )
    if not pairs or not asked or not isinstance(skills, list) or len(skills) != len(asked):
        raise ValueError(f"{path}:{int(entry.id) + 1}: no GenEval 2 questions with a skill each: {shorten(asked)}")
    if type(number) is not int or number < 1:
        raise ValueError(f"{path}:{int(entry.id) + 1}: expected a number of atoms, got {shorten(number)}")
    level = structured_complexity(skills.count("object"), number)
    return Entry(entry.prompt, f"{number} atoms", entry.id, entry.seed, number, level, entry.metadata)


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
    "geneval2": Source(
        ("geneval2/geneval2_data.jsonl",),
        "https://github.com/facebookresearch/GenEval2 (geneval2_data.jsonl; for non-commercial use)",
        800,
        read_geneval2,
    ),
    "t2i-compbench": Source(
        ("t2i_compbench",),
        "https://github.com/Karine-Huang/T2I-CompBench (examples/dataset/*_val.txt)",
        2400,
        read_t2i_compbench,
        images_per_prompt=10,
    ),
}
