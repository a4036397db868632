"""Prompts, and the one reader of files of them: environment, training and benchmarks see the same ones.

| file | a prompt is |
|---|---|
| ``.txt`` | a line |
| ``.csv`` | the column ``prompt`` of a row, quoted as RFC 4180 says: it may hold commas and line ends |
| ``.tsv`` | the same, separated by tabs; where a field is not quoted as a whole, its quotation marks are part of it |
| ``.json`` | an item of a list: a string, or the ``prompt`` of an object |
| ``.jsonl`` | a line: a JSON string, or the ``prompt`` of an object |

A column or name may be written in any case (``Prompt``); what has no ``prompt`` may call it ``caption``. Files are
UTF-8, with or without a byte-order mark. LF, CR LF and CR end a line, and no other character does. Blank lines are
skipped, and blanks around a prompt are not part of it. A list of strings is taken as it stands.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from addiff_env.loading.paths import looked_at, resolve_model

NAMES = ("prompt", "caption")  # of a prompt's column; the first that is there
_KNOWN = (*NAMES, "seed", "category", "tag")  # names that have a meaning, and are found in any case


@dataclass(frozen=True)
class PromptRow:
    """A prompt as its file states it."""

    prompt: str
    index: int  # from 0: of the line of a text or .jsonl file, of the row of a table, of the item of a .json file
    place: str  # for messages: file, and line, row or item
    fields: Mapping[str, Any] = field(default_factory=dict)  # the other columns of its row, or names of its object


@dataclass(frozen=True)
class BadRow:
    """What stands in a file where a prompt should, and why it is none."""

    index: int
    place: str
    reason: str


# Index, place and value of a row that was not checked yet: a string, a mapping, or the error that reading it gave.
Record = tuple[int, str, Any]


def check_prompt(prompt: Any, name: str = "a prompt") -> str:
    """Return ``prompt`` if it is a string that a tokenizer can take; the empty one is.

    Raises:
        TypeError: no string; ValueError: it holds half a surrogate pair, which is no text, or a NUL. The message shows
            it, under ``name``.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"{name} must be a string, got {type(prompt).__name__}: {prompt!r}")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        half = prompt[error.start]
        raise ValueError(f"{name} must be text, got {shorten(prompt)}: {half!r} is half a surrogate pair") from error
    if "\0" in prompt:
        raise ValueError(f"{name} must be text, got {shorten(prompt)}: it holds a NUL character")
    return prompt


def load_prompts(prompts: str | os.PathLike[str] | Iterable[str]) -> list[str]:
    """Prompts from a list, or from a file as this module's docstring says.

    A path may start with ``addiff_env:``, a folder of the package.

    Raises:
        FileNotFoundError: no such file; ValueError: no prompts, or as `read_prompts` and `check_prompt`;
        TypeError: neither a path nor strings.
    """
    if isinstance(prompts, (str, os.PathLike)):
        return [row.prompt for row in read_prompts(prompts)]
    if isinstance(prompts, (bytes, Mapping, Set)) or not isinstance(prompts, Iterable):  # a set has no order
        raise TypeError(
            f"prompts must be a list of strings or a file, got {type(prompts).__name__}: {shorten(prompts)}"
        )
    rows = [str(check_prompt(prompt, f"prompts[{index}]")) for index, prompt in enumerate(prompts)]
    if not rows:
        raise ValueError(f"no prompts in {prompts!r}")
    return rows


def read_prompts(path: str | os.PathLike[str]) -> list[PromptRow]:
    """Every prompt of a file with its place and what else is said of it; see this module's docstring.

    Raises:
        FileNotFoundError: no such file. ValueError: a kind of file that is not read, another encoding than UTF-8, no
            prompts, or a row without one, with its place.
    """
    rows = []
    for row in each_prompt(path):
        if isinstance(row, BadRow):
            raise ValueError(row.reason)
        rows.append(row)
    if not rows:
        raise ValueError(f"no prompts in {looked_at(path)}")
    return rows


def each_prompt(path: str | os.PathLike[str]) -> Iterator[PromptRow | BadRow]:
    """As `read_prompts`, with what is no prompt in its place; raises for the file as a whole only."""
    place = Path(resolve_model(path))
    if place.suffix.lower() not in READERS:
        raise ValueError(f"cannot read prompts from {looked_at(path)}: expected a list or a file {', '.join(READERS)}")
    if not os.path.isfile(place):
        what = "that is a folder" if os.path.isdir(place) else "there is none"
        raise FileNotFoundError(f"no prompt file {looked_at(path)}: {what}; prompts may be a list or a file")
    for index, where, value in READERS[place.suffix.lower()](place):
        try:
            yield _row(index, where, value)
        except ValueError as error:
            yield BadRow(index, where, str(error))


def _row(index: int, place: str, value: Any) -> PromptRow:
    if isinstance(value, ValueError):
        raise value
    if isinstance(value, str):
        return PromptRow(_stated_prompt(value, place), index, place)
    if not isinstance(value, Mapping):
        raise ValueError(f"{place}: expected an object with a 'prompt', or a string, got {shorten(value)}")
    fields = _fields(value.items(), place)
    name = next((name for name in NAMES if name in fields), None)
    if name is None:
        raise ValueError(f"{place}: expected an object with a 'prompt', got {shorten(value)}")
    return PromptRow(_stated_prompt(fields.pop(name), place), index, place, fields)


def _fields(items: Iterable[tuple[str, Any]], place: str) -> dict[str, Any]:
    """What is said under each name, those that have a meaning in lower case.

    Raises:
        ValueError: two names for one thing.
    """
    fields: dict[str, Any] = {}
    for name, value in items:
        plain = name.strip().lower()
        name = plain if plain in _KNOWN else name
        if name in _KNOWN and name in fields:
            raise ValueError(f"{place}: {name!r} is there more than once")
        fields[name] = value
    return fields


def _stated_prompt(prompt: Any, place: str) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{place}: expected a prompt, got {shorten(prompt)}")
    return check_prompt(prompt.strip(), f"{place}: a prompt")


def shorten(value: Any, limit: int = 80) -> str:
    """How ``value`` is written in code, cut where that is long: for messages."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + " ..."


# --------------------------------------------------------------------------- text


def read_utf8(path: Path) -> str:
    """The text of a file, without its byte-order mark.

    Raises:
        ValueError: it is not UTF-8; with the line of the first byte that is not.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(split_lines(error.object[: error.start].decode("utf-8") + "."))
        raise ValueError(
            f"{path}:{line}: not UTF-8, byte 0x{error.object[error.start]:02x} at offset {error.start} is none of it: "
            "save the file in that encoding"
        ) from error


def split_lines(text: str) -> list[str]:
    """Lines without their ends: LF, CR LF or CR, and not the other separators of Unicode, which prompts may hold."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines  # what follows a final newline is no line


def _read_txt(path: Path) -> Iterator[Record]:
    for index, line in enumerate(split_lines(read_utf8(path))):
        if line.strip():
            yield index, f"{path}:{index + 1}", line


# --------------------------------------------------------------------------- JSON


def parse_json(text: str, path: Path, line: int | None = None) -> Any:
    """The value of a JSON text: a whole file, or one ``line`` of it.

    Raises:
        ValueError: no JSON, with its place, or an object that names something twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unambiguous)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1) if line is None else line
        raise ValueError(f"{path}:{line}: no JSON: {error}: {shorten(text)}") from error


def _unambiguous(items: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(items)
    if len(names) < len(items):
        raise ValueError(f"an object has a name twice: {shorten([name for name, _ in items])}")
    return names


def _read_json(path: Path) -> Iterator[Record]:
    text = read_utf8(path)
    items = parse_json(text, path) if text.strip() else []
    if not isinstance(items, list):
        raise ValueError(f"{path}: expected a list of prompts, or of objects with a 'prompt', got {shorten(items)}")
    for index, item in enumerate(items):
        yield index, f"{path}: item {index + 1}", item


def _read_jsonl(path: Path) -> Iterator[Record]:
    for index, line in enumerate(split_lines(read_utf8(path))):
        if line.strip():
            try:
                value = parse_json(line, path, index + 1)
            except ValueError as error:
                value = error
            yield index, f"{path}:{index + 1}", value


# --------------------------------------------------------------------------- tables

# A field in quotation marks, those within it doubled; or whatever stands up to the next tab or line end.
_TSV_FIELD = re.compile(r'(?:"([^"]*(?:""[^"]*)*)"(?=[\t\r\n]|\Z)|([^\t\r\n]*))(\t|\r\n|\r|\n|\Z)')


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows with the number of their first line; empty lines are rows of nothing."""
    rows, line = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    try:
        for row in rows:
            yield line, row
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: no CSV: {error}") from error


def _tsv_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """As `_csv_rows`. The csv module would drop the marks of a prompt that begins with a word in quotation marks."""
    row: list[str] = []
    position, start, line = 0, 1, 1
    while position < len(text):
        found = _TSV_FIELD.match(text, position)
        assert found is not None  # the second alternative takes anything
        quoted, plain, end = found.groups()
        row.append(plain if quoted is None else quoted.replace('""', '"'))
        line += len(split_lines(found[0] + ".")) - 1
        position = found.end()
        if end != "\t" or position == len(text):
            row += [""] if end == "\t" else []  # a tab at the very end: an empty field follows
            yield start, row if row != [""] or quoted is not None else []
            row, start = [], line


def _table(path: Path, rows: Iterator[tuple[int, list[str]]]) -> Iterator[Record]:
    """Rows by the names of their columns, in lower case; what holds the prompts has to be one of them."""
    rows = ((line, row) for line, row in rows if row)
    line, header = next(rows, (1, []))
    if not header:
        return
    names = [name.strip().lower() for name in header]
    if not set(NAMES) & set(names):
        raise ValueError(f"{path}: no column 'prompt' among {sorted(set(names))}")
    if twice := sorted({name for name in names if name in _KNOWN and names.count(name) > 1}):
        raise ValueError(f"{path}:{line}: columns {', '.join(map(repr, twice))} are there more than once")
    prompts = names.index(next(name for name in NAMES if name in names))
    for index, (line, row) in enumerate(rows):
        place = f"{path}:{line}: row {index + 1}"
        if len(row) != len(names):
            yield index, place, ValueError(f"{place} has not {len(names)} columns: {shorten(row)}")
        elif row[prompts].strip().lower() == "nan":  # how tables spell that nothing is there
            yield index, place, ValueError(f"{place}: expected a prompt, got {row[prompts]!r}")
        else:
            yield index, place, dict(zip(names, row, strict=True))


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".txt": _read_txt,
    ".csv": lambda path: _table(path, _csv_rows(read_utf8(path), path)),
    ".tsv": lambda path: _table(path, _tsv_rows(read_utf8(path))),
    ".json": _read_json,
    ".jsonl": _read_jsonl,
}
