"""Append-only JSON lines that survive a kill: what was written whole is read, a torn last line is cut off."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, cast

from addiff_env.storage.files import parse_json, told_when_full

_BLOCK = 1 << 16  # bytes read at a time while looking for the last newline


def read_objects(path: Path) -> list[dict[str, Any]]:
    """Objects of a file, in order; what follows the last newline was not written whole and is dropped.

    No file gives no objects.

    Raises:
        ValueError: a complete line that is no JSON object; with its number.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [parse_json(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def append_objects(path: Path, objects: Iterable[dict[str, Any]]) -> None:
    """Append objects and force them to disk; a torn last line left by a kill is cut off first.

    Raises:
        ValueError: a number that JSON has no word for (NaN, infinity); nothing is written then. DiskFullError: there is
            no room; what stood there stays.
    """
    lines = [_line(values) for values in objects]
    path.parent.mkdir(parents=True, exist_ok=True)
    with told_when_full(path), path.open("a+b") as file:
        _cut_torn_line(cast(BinaryIO, file))
        file.write(b"".join(lines))
        file.flush()
        os.fsync(file.fileno())


def _line(values: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(values, allow_nan=False) + "\n").encode()
    except ValueError as error:
        raise ValueError(f"{error}: {values!r}") from error


def _cut_torn_line(file: BinaryIO) -> None:
    """Truncate the file behind its last newline, looking for it from the end."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _BLOCK)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    file.truncate(end)
    file.seek(0, os.SEEK_END)
