"""RLlib's checkpoint is a folder: it is written beside the old one and swapped for it by renaming."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

NAME = "checkpoint"


def save(run: Path, write: Callable[[str], object]) -> None:
    """Let ``write`` fill a new folder and swap it in; killed at any moment, `find` finds the old one or the new one."""
    kept, new, old = _folders(run)
    write(str(new))
    if kept.exists():
        kept.rename(old)
    new.rename(kept)
    shutil.rmtree(old, ignore_errors=True)


def find(run: Path) -> Path | None:
    """The run's checkpoint, if it has one; finishes or undoes a `save` that was killed."""
    kept, new, old = _folders(run)
    if old.exists() and not kept.exists():  # killed between the renamings, so the new one is whole
        (new if new.exists() else old).rename(kept)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    return kept if kept.exists() else None


def _folders(run: Path) -> tuple[Path, Path, Path]:
    return run / NAME, run / f"{NAME}.new", run / f"{NAME}.old"
