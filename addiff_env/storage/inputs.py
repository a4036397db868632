"""What a run reads: the contents of every file and folder that its settings name, so that resuming can compare them.

Contents alone count. Where a file lies, what it is called, who owns it and when it was written does not.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from addiff_env.loading.paths import resolve_model

# Settings of an environment that may name files.
FILE_SETTINGS = ("model", "lora", "clip", "dino", "scorer", "preview_model", "prompts")
DIGITS = 12  # of a SHA-256 in hexadecimal
_NOTHING = "nothing"
_REMEMBERED = 1 << 20  # bytes: of larger files the hash is remembered for as long as they look the same


def fingerprint(setting: Any) -> str | None:
    """Hexadecimal digits that change with the contents of what is local of ``setting``; None where nothing is.

    Args:
        setting: a path, or a text with paths in it: ``aesthetic:head.safetensors,clip=folder``, the rest of which
            counts as it is written.
    """
    if not isinstance(setting, (str, os.PathLike)):
        return None
    text = os.fspath(setting)
    if (whole := _contents_of(text)) is not None:
        return whole
    parts = re.split("([,=@])", text)
    shown = [_with_contents(part, after) for part, after in zip(parts, [*parts[1:], ""], strict=True)]
    return None if shown == parts else hashlib.sha256("".join(shown).encode()).hexdigest()[:DIGITS]


def _with_contents(part: str, after: str) -> str:
    """A part of a setting, where it is a path (also behind colons) with the contents in its place."""
    pieces = part.split(":")
    for start in range(len(pieces) if after != "=" else 0):  # what stands before that is an option's name
        if (found := _contents_of(":".join(pieces[start:]))) is not None:
            return ":".join([*pieces[:start], found])
    return part


def _contents_of(path: str) -> str | None:
    place = resolve_model(path)
    return contents(Path(place)) if os.path.isfile(place) or os.path.isdir(place) else None


def fingerprints(settings: Mapping[str, Any]) -> dict[str, str]:
    """The `fingerprint` of every setting that names something local, by its name."""
    found = {name: fingerprint(value) for name, value in settings.items()}
    return {name: digest for name, digest in found.items() if digest is not None}


def contents(place: Path) -> str:
    """The SHA-256, shortened, of a file's bytes, or of a folder's files by their names in it.

    Hidden files (and what is in hidden folders) do not count.
    """
    if not place.is_dir():
        return _hash_file(place)[:DIGITS]
    digest = hashlib.sha256()
    for name, path in sorted(_files_below(place)):
        digest.update(f"{name} {_hash_file(path)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:DIGITS]


def _files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """Relative name and path of every file, through links to folders, but round no circle."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in files:
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                yield path.relative_to(folder).as_posix(), path


def _hash_file(path: Path) -> str:
    state = path.stat()
    if state.st_size < _REMEMBERED:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return _hash_large(str(path.resolve()), state.st_ino, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hash_large(path: str, *_state: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_REMEMBERED):
            digest.update(block)
    return digest.hexdigest()


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by their dotted names; an empty mapping is a leaf."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def differing(
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    contents_now: Mapping[str, str],
    contents_there: Mapping[str, str],
    named: Mapping[str, Any] = MappingProxyType({}),
    by_name: Collection[str] = (),
) -> list[str]:
    """Every value in which two runs differ, in words.

    A file that lies elsewhere is no difference, other contents in the same place are one. Contents that one of them
    does not know (an earlier release kept none) are not compared, and a setting that is null in one and that the other
    does not have is off in both.

    Args:
        ours: flat settings.
        theirs: the same of the other run.
        contents_now: `fingerprints` of those of ours that name files.
        contents_there: the same of theirs.
        named: what the message shows of a setting that is not among ``ours``.
        by_name: settings whose names have to be the same, too.
    """
    found = []
    for name in dict.fromkeys([*ours, *theirs, *contents_now]):
        mine, other = ours.get(name, _NOTHING), theirs.get(name, _NOTHING)
        now, before = contents_now.get(name), contents_there.get(name)
        differs = mine != other and not (mine in (None, _NOTHING) and other in (None, _NOTHING))
        if differs and (now is None or now != before or name in by_name):
            found.append(f"{name}: {other} there, {mine} now")
        elif mine == other and None not in (now, before) and now != before:
            found.append(f"{name}: {named.get(name, mine)} has other contents now ({before} there, {now} now)")
    return found
