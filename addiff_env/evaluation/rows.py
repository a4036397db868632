"""Result rows on disk: one JSON object a line, appended and fsynced, so that a run can be killed and go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import BinaryIO, cast

from addiff_env.types import ResultRow


def read_rows(path: Path) -> list[ResultRow]:
    """Rows of a file; a torn last line (no newline, or cut JSON) is dropped, no file gives no rows.

    Raises:
        ValueError: a damaged line that is not the last, or unknown fields; with its number.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    complete, torn = lines[:-1], lines[-1]  # what follows the last newline was not written whole
    del torn
    return [_parse(line, number, path) for number, line in enumerate(complete, 1)]


def _parse(line: str, number: int, path: Path) -> ResultRow:
    known = {f.name for f in fields(ResultRow)}
    try:
        values = json.loads(line)
        unknown = set(values) - known
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)}")
        return ResultRow(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}:{number} is damaged: {error}: {line[:80]!r}") from error


def append_rows(path: Path, rows: Iterable[ResultRow]) -> None:
    """Append rows and force them to disk; a torn last line left by a kill is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        _cut_torn_line(cast(BinaryIO, file))
        for row in rows:
            file.write((json.dumps(asdict(row)) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def _cut_torn_line(file: BinaryIO) -> None:
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)
