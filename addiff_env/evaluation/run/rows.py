"""Result rows on disk: one JSON object a line, appended and fsynced, so that a run can be killed and go on.

A run may be split: shard ``k`` of ``n`` makes the items whose index is ``k`` modulo ``n`` and writes its own file;
`merge_rows` puts the files together again and refuses whatever is not one whole, unmixed run.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from addiff_env.evaluation.files import RunFolder
from addiff_env.storage.commands import LAUNCHED
from addiff_env.storage.files import replacing
from addiff_env.storage.jsonl import append_objects, read_objects
from addiff_env.types import ResultRow, SampleKey

T = TypeVar("T")
CONFIGURATION = ("backbone", "solver", "policy", "dtype")  # one value each per method
_OPTIONAL = ("negative_prompt", "price")  # left out of the file where there is none
_SHOWN = 5  # offending values that a message lists


def read_rows(path: Path) -> list[ResultRow]:
    """Rows of a file; a torn last line (one without a newline) is dropped, no file gives no rows.

    Raises:
        ValueError: a damaged line, unknown or missing fields; with its number.
    """
    return [_parse(values, f"{path}:{number}") for number, values in enumerate(read_objects(path), 1)]


def count_rows(path: Path) -> int:
    """How many whole rows a file has, whatever they hold."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _parse(values: dict[str, Any], place: str) -> ResultRow:
    unknown = sorted(set(values) - {f.name for f in fields(ResultRow)})
    if unknown:
        raise ValueError(f"{place} is damaged: unknown fields {unknown}")
    try:
        return ResultRow(**values)
    except TypeError as error:
        raise ValueError(f"{place} is damaged: {error}") from error


def write_rows(path: Path, rows: Iterable[ResultRow]) -> None:
    """Write a whole file at once: a kill leaves the old one or the new one; raises as `append_rows`."""
    with replacing(path) as partial:
        append_rows(partial, rows)


def append_rows(path: Path, rows: Iterable[ResultRow]) -> None:
    """Append rows and force them to disk; a torn last line left by a kill is cut off first.

    Raises:
        ValueError: a score or cost that is NaN or infinite; nothing is written then.
    """
    append_objects(path, map(_as_object, rows))


def _as_object(row: ResultRow) -> dict[str, Any]:
    values = asdict(row)
    del values["timed_seconds"]  # of another measurement, which has a file of its own
    return {name: value for name, value in values.items() if name not in _OPTIONAL or value is not None}


# --------------------------------------------------------------------------- shards


class MissingRows(ValueError):
    """A run that is not whole yet."""


def launched_shard(index: int, shards: int, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """The shard of this process, of how many: as told, or its rank where accelerate or torchrun launched several.

    Raises:
        ValueError: both, or ranks that make no sense.
    """
    rank, world = (environment.get(name) for name in LAUNCHED)
    if rank is None or world is None or world == "1":
        return index, shards
    if shards != 1:
        raise ValueError(f"{world} processes were launched, each of which would make shard {index} of {shards}")
    try:
        place = int(rank), int(world)
    except ValueError as error:
        raise ValueError(f"expected whole numbers in RANK and WORLD_SIZE, got {rank!r} and {world!r}") from error
    _check_shard(*place)
    return place


def merge_if_whole(
    folder: Path, shards: int, places: Sequence[SampleKey], methods: Sequence[str] | None = None
) -> list[ResultRow] | None:
    """As `merge_shards`, or None while other shards are at work; raises for whatever more rows would not mend."""
    try:
        return merge_shards(folder, shards, places, methods)
    except (MissingRows, FileNotFoundError):
        return None


def shard(items: Sequence[T], index: int, shards: int) -> list[T]:
    """The items of one shard: those whose index is ``index`` modulo ``shards``.

    Raises:
        ValueError: no such shard.
    """
    _check_shard(index, shards)
    return list(items[index::shards])


def shard_path(folder: Path, index: int, shards: int) -> Path:
    """Where a shard writes: ``rows.jsonl`` for a run that is not split, else ``rows-<index>-of-<shards>.jsonl``."""
    _check_shard(index, shards)
    return RunFolder(folder).rows if shards == 1 else folder / f"rows-{index:04d}-of-{shards:04d}.jsonl"


def _check_shard(index: int, shards: int) -> None:
    if not 0 <= index < shards:
        raise ValueError(f"no shard {index} of {shards}: shards count from 0")


def merge_shards(
    folder: Path, shards: int, places: Sequence[SampleKey], methods: Sequence[str] | None = None
) -> list[ResultRow]:
    """Read a split run's files and merge them, see `merge_rows`.

    Raises:
        FileNotFoundError: shards without a file, by name.
        ValueError: as `merge_rows`.
    """
    paths = [shard_path(folder, index, shards) for index in range(shards)]
    absent = [path.name for path in paths if not path.exists()]
    if absent:
        raise FileNotFoundError(f"{len(absent)} of {shards} shards left no file in {folder}: {_some(absent)}")
    return merge_rows([read_rows(path) for path in paths], places, methods)


def merge_rows(
    parts: Iterable[Sequence[ResultRow]], places: Sequence[SampleKey], methods: Sequence[str] | None = None
) -> list[ResultRow]:
    """One run's rows from its parts, however it was split: methods in order, each with its rows in ``places``' order.

    Args:
        parts: rows of each file.
        places: (prompt, seed) of every item of the benchmark, in order.
        methods: names in the order wanted, all of which have to be there; rows of others are left out. By default
            whatever appears, in that order: a method of which every shard lacks all rows is then not missed.

    Raises:
        ValueError: mixed configurations (several code versions, or several backbones, solvers, policies, dtypes,
            negative prompts or prices of one method), duplicates, gaps, or rows that belong to no item; with the
            offending values.
    """
    rows = [row for part in parts for row in part if methods is None or row.method in methods]
    names = list(dict.fromkeys(row.method for row in rows)) if methods is None else list(methods)
    _refuse_mixed(rows)
    _refuse_duplicates(rows)
    found = {(row.method, row.prompt, row.seed): row for row in rows}
    wanted = [(name, prompt, seed) for name in names for prompt, seed in places]
    _refuse_unexpected(found, set(wanted))
    _refuse_gaps(wanted, found)
    return [found[key] for key in wanted]


def _refuse_mixed(rows: Sequence[ResultRow]) -> None:
    versions = Counter(row.code_version for row in rows)
    if len(versions) > 1:
        raise ValueError(f"rows of {len(versions)} code versions: {_counts(versions)}")
    for name in dict.fromkeys(row.method for row in rows):
        for part in (*CONFIGURATION, *_OPTIONAL):
            values = Counter(getattr(row, part) for row in rows if row.method == name)
            if len(values) > 1:
                raise ValueError(f"method {name!r} was run with {len(values)} values of {part}: {_counts(values)}")


def _refuse_duplicates(rows: Sequence[ResultRow]) -> None:
    counts = Counter((row.method, row.prompt, row.seed) for row in rows)
    twice = [key for key, number in counts.items() if number > 1]
    if twice:
        raise ValueError(f"{len(twice)} measurements appear more than once (method, prompt, seed): {_some(twice)}")


def _refuse_unexpected(found: Mapping[tuple, ResultRow], wanted: set[tuple]) -> None:
    unexpected = [key for key in found if key not in wanted]
    if unexpected:
        raise ValueError(
            f"{len(unexpected)} rows belong to no item of the benchmark (method, prompt, seed): {_some(unexpected)}"
        )


def _refuse_gaps(wanted: Sequence[tuple], found: Mapping[tuple, ResultRow]) -> None:
    gaps = [key for key in wanted if key not in found]
    if gaps:
        raise MissingRows(f"{len(gaps)} of {len(wanted)} rows are missing (method, prompt, seed): {_some(gaps)}")


def _counts(values: Counter) -> str:
    return ", ".join(f"{value!r} ({number} rows)" for value, number in values.most_common(_SHOWN))


def _some(values: Sequence) -> str:
    more = len(values) - _SHOWN
    return ", ".join(repr(value) for value in values[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
