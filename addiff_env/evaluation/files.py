"""Files of a folder that several processes work in, on several machines if need be."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

LOCK = ".lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait for, and hold, a folder's lock: what follows is done by one process at a time. A killed one lets go."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK):
        yield


def partial_of(path: Path) -> Path:
    """A name beside ``path`` that no other process uses, here or on another machine."""
    return path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")


def write_whole(path: Path, text: str) -> None:
    """Write a file at once: whoever reads it sees the old one or the new one."""
    partial = partial_of(path)
    partial.write_text(text)
    os.replace(partial, path)


def keep_first(path: Path, text: str) -> None:
    """Write a file, unless another process was faster: whole or not at all, and never over another's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    partial.write_text(text)
    try:
        os.link(partial, path)
    except FileExistsError:
        pass
    finally:
        partial.unlink()
