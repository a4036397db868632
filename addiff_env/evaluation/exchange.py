"""Lay a run's pictures out as the benchmarks' official scripts take them, and bring their results back as a metric.

    addiff export runs/mine --layout geneval --out pictures       a folder for each method, and index.json
    python evaluation/evaluate_images.py pictures/agent ...       the official script, in its own environment
    addiff import runs/mine pictures/agent/results.jsonl          geneval_official in rows.jsonl; report again

| layout | pictures of a method | results |
|---|---|---|
| ``geneval`` | ``00000/samples/0000.png`` beside ``00000/metadata.jsonl`` | ``results.jsonl``: filename, correct |
| ``t2i-compbench`` | ``<category>/samples/<prompt>_000000.png`` | ``vqa_result.json``: question_id, answer |
| ``geneval2`` | ``0/image_paths.json``, from prompts to files (1, 2, ...: further pictures) | per-atom scores as JSON |
| ``flat`` | ``00000.png``, and ``prompts.jsonl`` beside | JSONL or CSV: file, and a column per metric |

Results are read from anywhere below the export, so that they tell which of its folders they are about.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from addiff_env.env.prompts import parse_json, read_utf8
from addiff_env.evaluation.benchmarks.items import Item, load_benchmark
from addiff_env.evaluation.metrics.geneval2 import AM, GM, soft_tifa
from addiff_env.evaluation.metrics.models import OFFICIAL, keep_imported
from addiff_env.evaluation.run.rows import read_rows, write_rows
from addiff_env.evaluation.run.run_folder import read_items, read_provenance, reported_rows
from addiff_env.loading.paths import looked_at
from addiff_env.storage.files import claim, file_name, new_folder, read_json, write_whole
from addiff_env.storage.jsonl import read_objects
from addiff_env.types import ResultRow

INDEX = "index.json"


@dataclass(frozen=True)
class Picture:
    """A picture of an export."""

    file: str  # relative to the export
    group: str  # its folder that a results file speaks of, relative to the export
    number: int  # in that group
    method: str
    prompt: str
    seed: int


Scores = Iterator[tuple[str, dict[str, float]]]  # a picture's file, and its scores by name


# --------------------------------------------------------------------------- export


def export(run: Path, layout: str, out: Path, root: str | None = None) -> list[Picture]:
    """Copy the pictures of a finished run into ``out``, which must be empty or not there: all of them, or none.

    Args:
        run: its folder.
        layout: one of `LAYOUTS`.
        out: the export.
        root: folder of the public lists, for layouts that hold the benchmark's metadata.

    Raises:
        FileNotFoundError: no such run, or a picture of it is gone.
        ValueError: a picture was not kept, ``out`` holds something, the run is of another benchmark, or the layout is
            unknown.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if not (run / "rows.jsonl").exists():
        raise FileNotFoundError(f"no rows.jsonl in {looked_at(run)}")
    rows, items = reported_rows(run), {(item.prompt, item.seed): item for item in read_items(run)}
    for row in rows:
        if not row.image:
            raise ValueError(f"{row.method}, {row.prompt!r}, seed {row.seed}: its picture was not kept")
        if not (run / row.image).is_file():
            raise FileNotFoundError(f"no picture {run / row.image} of {row.method}, {row.prompt!r}")
    pairs = [(row, items[row.prompt, row.seed]) for row in rows]
    pictures = LAYOUTS[layout].place(pairs)
    metadata = _metadata(run, root) if LAYOUTS[layout].with_metadata else {}
    with new_folder(out, "addiff export") as partial:
        for row, picture in zip(rows, pictures, strict=True):
            target = partial / picture.file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / row.image, target)
        texts = LAYOUTS[layout].describe(out, pictures, [metadata.get(item.id, {}) for _, item in pairs])
        texts[INDEX] = json.dumps({"layout": layout, "pictures": [asdict(one) for one in pictures]}) + "\n"
        for name, text in texts.items():
            write_whole(partial / name, text)
    return pictures


def _metadata(run: Path, root: str | None) -> dict[str, Mapping[str, Any]]:
    """The benchmark's own metadata, by the id of its entries."""
    name = str(read_provenance(run).get("benchmark"))
    if name != "geneval":
        raise ValueError(f"{looked_at(run)} is a run of {name!r}: the layout is for geneval")
    return {item.id: item.metadata for item in load_benchmark(name, root=root, images_per_prompt=1, any_length=True)}


Pairs = Sequence[tuple[ResultRow, Item]]


def _numbering() -> Callable[[Hashable], int]:
    """How often it was asked about the same thing before: 0, 1, 2, ..."""
    counts: defaultdict[Hashable, Iterator[int]] = defaultdict(count)
    return lambda thing: next(counts[thing])


def _place_geneval(pairs: Pairs) -> list[Picture]:
    repeat, found = _numbering(), []
    for number, (row, item) in enumerate(pairs):
        group = file_name(row.method)
        file = f"{group}/{int(item.id):05d}/samples/{repeat((row.method, item.id)):04d}.png"
        found.append(_picture(row, file, group, number))
    return found


def _place_t2i(pairs: Pairs) -> list[Picture]:
    number, found = _numbering(), []
    for row, item in pairs:
        group = f"{file_name(row.method)}/{file_name(item.category)}"
        k = number(group)  # the scripts order a folder by these numbers, which name the questions
        found.append(_picture(row, f"{group}/samples/{_as_file(row.prompt)}_{k:06d}.png", group, k))
    return found


def _as_file(prompt: str) -> str:
    """A prompt as the scripts read it off a file's name, up to the first underscore; as much as a name may hold."""
    return re.sub(r"[/_\x00\n]", " ", prompt).encode()[:240].decode(errors="ignore")


def _place_geneval2(pairs: Pairs) -> list[Picture]:
    repeat = _numbering()
    return _in_groups((row, f"{file_name(row.method)}/{repeat((row.method, row.prompt))}") for row, _ in pairs)


def _place_flat(pairs: Pairs) -> list[Picture]:
    return _in_groups((row, file_name(row.method)) for row, _ in pairs)


def _in_groups(rows: Iterable[tuple[ResultRow, str]]) -> list[Picture]:
    """Pictures numbered within their groups."""
    number, found = _numbering(), []
    for row, group in rows:
        k = number(group)
        found.append(_picture(row, f"{group}/{k:05d}.png", group, k))
    return found


def _picture(row: ResultRow, file: str, group: str, number: int) -> Picture:
    return Picture(file, group, number, row.method, row.prompt, row.seed)


Described = Callable[[Path, Sequence[Picture], Sequence[Mapping[str, Any]]], dict[str, str]]  # texts by their files


def _describe_geneval(out: Path, pictures: Sequence[Picture], metadata: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    pairs = zip(pictures, metadata, strict=True)
    return {f"{Path(one.file).parents[1]}/metadata.jsonl": json.dumps(dict(own)) + "\n" for one, own in pairs}


def _describe_geneval2(out: Path, pictures: Sequence[Picture], metadata: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    paths = {
        group: {one.prompt: str((out / one.file).absolute()) for one in own}
        for group, own in _by_group(pictures).items()
    }
    return {f"{group}/image_paths.json": json.dumps(own, indent=1) + "\n" for group, own in paths.items()}


def _describe_flat(out: Path, pictures: Sequence[Picture], metadata: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    def line(one: Picture) -> str:
        return json.dumps({"file": Path(one.file).name, "prompt": one.prompt, "seed": one.seed}) + "\n"

    return {f"{group}/prompts.jsonl": "".join(map(line, own)) for group, own in _by_group(pictures).items()}


def _by_group(pictures: Iterable[Picture]) -> dict[str, list[Picture]]:
    groups: dict[str, list[Picture]] = {}
    for one in pictures:
        groups.setdefault(one.group, []).append(one)
    return groups


# --------------------------------------------------------------------------- import


def bring_back(run: Path, results: Path, metric: str | None = None, replace: bool = False) -> tuple[list[str], int]:
    """Add an official script's results to a run's rows; returns the names of the scores, and how many pictures.

    Args:
        run: its folder.
        results: a file below an export of this run.
        metric: name of the score, instead of the layout's own; not of layouts with several.
        replace: overwrite scores of the same name.

    Raises:
        FileNotFoundError: no such file, or no export around it.
        ValueError: a damaged file, a result of no picture of the export, two of one, a score that is no finite number,
            none at all, or one that is there already; nothing is written then.
    """
    if not results.is_file():
        raise FileNotFoundError(f"no file {looked_at(results)}")
    out = next((folder for folder in results.absolute().parents if (folder / INDEX).is_file()), None)
    if out is None:
        raise FileNotFoundError(f"no {INDEX} in a folder around {looked_at(results)}: results lie below their export")
    index = read_json(out / INDEX)
    pictures = [Picture(**one) for one in index["pictures"]]
    place = results.absolute().parent.relative_to(out).as_posix()
    near = [one for one in pictures if place == one.group or place.startswith(f"{one.group}/")]
    scores = _checked(LAYOUTS[index["layout"]].read(results, near or pictures, metric), results)
    by_place = {(one.method, one.prompt, one.seed): scores[one.file] for one in pictures if one.file in scores}
    with claim(run, "the import"):
        reported = {row.key for row in reported_rows(run)}
        rows = read_rows(run / "rows.jsonl")
        return _add(run, rows, reported, by_place, replace)


def _add(
    run: Path,
    rows: list[ResultRow],
    reported: set[tuple[Any, ...]],
    scores: Mapping[tuple[str, str, int], Mapping[str, float]],
    replace: bool,
) -> tuple[list[str], int]:
    wanted = [row for row in rows if row.key in reported and (row.method, row.prompt, row.seed) in scores]
    if len(wanted) < len(scores):
        raise ValueError(f"{len(scores) - len(wanted)} of {len(scores)} results are of no row in {looked_at(run)}")
    for row in wanted:
        new = scores[row.method, row.prompt, row.seed]
        if (twice := set(new) & set(row.scores)) and not replace:
            raise ValueError(f"{row.method}, {row.prompt!r} has {', '.join(sorted(twice))} already: --replace")
        row.scores = {**row.scores, **new}
    write_rows(run / "rows.jsonl", rows)
    names = list(dict.fromkeys(name for own in scores.values() for name in own))
    keep_imported(run, names)
    return names, len(wanted)


def _checked(scores: Scores, results: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for file, own in scores:
        if file in found:
            raise ValueError(f"{looked_at(results)} holds two results of {file}")
        for name, value in own.items():
            if not math.isfinite(value):
                raise ValueError(f"{looked_at(results)}: {name} of {file} is {value}")
        found[file] = own
    if not found:
        raise ValueError(f"{looked_at(results)} holds no results")
    return found


def _read_geneval(results: Path, pictures: Sequence[Picture], metric: str | None) -> Scores:
    for line, values in enumerate(read_objects(results), 1):
        place = f"{looked_at(results)}:{line}"
        if not isinstance(values.get("correct"), bool) or not isinstance(values.get("filename"), str):
            raise ValueError(f"{place}: expected filename and correct, got {', '.join(values) or 'nothing'}")
        picture = _of_file(values["filename"], pictures, place)
        yield picture.file, {metric or f"geneval{OFFICIAL}": float(values["correct"])}


def _of_file(name: str, pictures: Sequence[Picture], place: str) -> Picture:
    """The picture whose file a script's name ends with, or the other way round; scripts run in other folders."""
    parts = Path(name).as_posix().lstrip("./")
    same = [one for one in pictures if f"/{parts}".endswith(f"/{one.file}") or f"/{one.file}".endswith(f"/{parts}")]
    if len(same) != 1:
        raise ValueError(f"{place}: {name!r} is {'no picture' if not same else 'several pictures'} of the export")
    return same[0]


def _read_t2i(results: Path, pictures: Sequence[Picture], metric: str | None) -> Scores:
    if len({one.group for one in pictures}) > 1:
        raise ValueError(f"{looked_at(results)} must lie below the folder of its method and category")
    numbers = {one.number: one.file for one in pictures}
    for one in _listed(results):
        number = one.get("question_id") if isinstance(one, dict) else None
        if type(number) is not int or number not in numbers:
            raise ValueError(f"{looked_at(results)}: question_id {number!r} is no picture of {pictures[0].group}")
        yield numbers[number], {metric or f"t2i_compbench{OFFICIAL}": _float(one.get("answer"), results)}


def _listed(results: Path) -> list[Any]:
    content = parse_json(read_utf8(results), results)
    if not isinstance(content, list):
        raise ValueError(f"{looked_at(results)}: expected a list, got {type(content).__name__}")
    return content


def _read_geneval2(results: Path, pictures: Sequence[Picture], metric: str | None) -> Scores:
    if metric is not None:
        raise ValueError(f"results of geneval2 are {GM}{OFFICIAL} and {AM}{OFFICIAL}; --metric names one")
    if len({one.group for one in pictures}) > 1:
        raise ValueError(f"{looked_at(results)} must lie in the folder of its image_paths.json")
    content = parse_json(read_utf8(results), results)
    if isinstance(content, list):  # in the order of the prompts
        content = dict(zip([one.prompt for one in pictures], content, strict=len(content) == len(pictures)))
    if not isinstance(content, dict) or len(content) != len(pictures):
        raise ValueError(f"{looked_at(results)}: expected the atoms' scores of {len(pictures)} prompts")
    files = {one.prompt: one.file for one in pictures}
    for prompt, atoms in content.items():
        if prompt not in files or not isinstance(atoms, list):
            raise ValueError(f"{looked_at(results)}: expected a list of scores of a prompt of the export: {prompt!r}")
        own = soft_tifa([_float(value, results) for value in atoms], ["object"] * len(atoms))
        yield files[prompt], {f"{name}{OFFICIAL}": own[name] for name in (GM, AM)}


def _read_flat(results: Path, pictures: Sequence[Picture], metric: str | None) -> Scores:
    if results.suffix.lower() == ".csv":
        with results.open(newline="", encoding="utf-8-sig") as file:
            lines: list[dict[str, Any]] = list(csv.DictReader(file))
    else:
        lines = read_objects(results)
    for number, values in enumerate(lines, 1):
        place = f"{looked_at(results)}: result {number}"
        name = values.pop("file", None)
        if not isinstance(name, str) or not values or (metric and len(values) > 1):
            raise ValueError(f"{place}: expected a file and {'one score' if metric else 'scores'}")
        own = {metric or key: _float(value, results) for key, value in values.items() if key not in ("prompt", "seed")}
        yield _of_file(name, pictures, place).file, own


def _float(value: Any, results: Path) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{looked_at(results)}: {value!r} is no number") from error


@dataclass(frozen=True)
class Layout:
    """Where pictures lie, what stands beside them, and how results are read."""

    place: Callable[[Pairs], list[Picture]]
    describe: Described
    read: Callable[[Path, Sequence[Picture], str | None], Scores]
    with_metadata: bool = False  # of the benchmark


LAYOUTS = {
    "geneval": Layout(_place_geneval, _describe_geneval, _read_geneval, with_metadata=True),
    "t2i-compbench": Layout(_place_t2i, lambda out, pictures, metadata: {}, _read_t2i),
    "geneval2": Layout(_place_geneval2, _describe_geneval2, _read_geneval2),
    "flat": Layout(_place_flat, _describe_flat, _read_flat),
}


# --------------------------------------------------------------------------- the commands


def main(argv: Sequence[str] | None = None) -> int:
    """``addiff export``; returns the exit status."""
    text = "Lay a finished evaluation's pictures out as official evaluation scripts take them."
    parser = argparse.ArgumentParser(prog="addiff export", description=text)
    parser.add_argument("run", type=Path, help="run folder of evaluate.py, e.g. runs/mine")
    parser.add_argument("--layout", choices=LAYOUTS, required=True, help="of which benchmark's scripts")
    parser.add_argument("--out", type=Path, help="folder to make (default: RUN/export-LAYOUT)")
    parser.add_argument("--root", help="folder of the public lists (default: ADDIFF_DATA)")
    told = parser.parse_args(argv)
    out = told.out or told.run / f"export-{told.layout}"
    pictures = export(told.run, told.layout, out, told.root)
    print(f"{len(pictures):,} pictures of {len({one.method for one in pictures})} methods in {out}")
    return 0
