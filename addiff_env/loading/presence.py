"""Whether the files that a model needs are there: in a folder, or in the Hub's cache. No network; no weight is read.

A folder or repository is looked at for one name of each group: ``model.safetensors`` or its index, for example. What an
index lists has to be there as well, and safetensors have to be as long as their headers say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from addiff_env.loading.damage import INDEX, damage, shards_of, wrong_at
from addiff_env.loading.paths import PACKAGE_PREFIX, looked_at, resolve_model
from addiff_env.loading.weights import gated_advice

Group = Sequence[str]  # names of files, one of which has to be there
Find = Callable[[str], Path | None]  # a file by its name in a folder or repository

LOCAL, CACHED, MISSING, GATED, DAMAGED = "local", "in the cache", "missing", "gated", "damaged"


@dataclass(frozen=True)
class Needed:
    """What one setting loads.

    Attributes:
        setting: its name, as users give it.
        place: a file, a folder, or the id of a repository of the Hub.
        files: groups of names in it; none where ``place`` is a file.
        revision: of the repository.
        fetch: the command that brings a repository's files here.
    """

    setting: str
    place: str
    files: tuple[Group, ...] = ()
    revision: str | None = None
    fetch: str = ""


@dataclass(frozen=True)
class Found:
    """Where a `Needed` is, or what of it is not: ``state`` is one of the five above, ``detail`` says which files."""

    needed: Needed
    state: str
    detail: str

    @property
    def is_there(self) -> bool:
        """Whether it can be loaded, as far as can be told without reading it."""
        return self.state in (LOCAL, CACHED)


def is_hub_id(place: str) -> bool:
    """Whether ``place`` may be a repository of the Hub: there is no such folder or file, and it looks like an id."""
    if place.startswith((".", "/", "~", PACKAGE_PREFIX)) or Path(place).exists():
        return False
    try:
        validate_repo_id(place)
    except HFValidationError:
        return False
    return True


def folder_of(place: str) -> Path | None:
    """The folder that ``place`` names, if there is one."""
    try:
        folder = Path(resolve_model(place))
    except FileNotFoundError:  # of the package
        return None
    return folder if folder.is_dir() else None


def finder(place: str, revision: str | None = None) -> Find:
    """Looks files up in a folder, or in the cached copy of a repository."""
    if (folder := folder_of(place)) is not None:
        return lambda name: path if (path := folder / name).is_file() else None

    def cached(name: str) -> Path | None:
        found = try_to_load_from_cache(place, name, revision=revision) if is_hub_id(place) else None
        return Path(found) if isinstance(found, str) else None

    return cached


def look_for(needed: Needed) -> Found:
    """Find out whether it is there."""
    try:
        path = Path(resolve_model(needed.place))
    except FileNotFoundError as error:
        return Found(needed, MISSING, str(error))
    if path.is_file() and needed.files:
        return Found(needed, MISSING, wrong_at(path).removeprefix("; "))
    if path.is_file():
        return _judge(needed, LOCAL, str(path), [], [path])
    if not path.is_dir() and not (needed.files and is_hub_id(needed.place)):
        return Found(needed, MISSING, f"there is no {looked_at(path)}")
    find = finder(needed.place, needed.revision)
    absent, there = [], []
    for group in needed.files:
        files = list(_files(find, group))
        absent += [name for name, file in files if file is None]
        there += [file for _, file in files if file is not None]
    if path.is_dir():
        return _judge(needed, LOCAL, str(path), absent, there)
    return _judge(needed, CACHED, str(there[0].parent) if there else "", absent, there)


def _judge(needed: Needed, state: str, where: str, absent: Sequence[str], there: Sequence[Path]) -> Found:
    if absent:
        gated = state == CACHED and gated_advice(OSError(), needed.place)
        return Found(needed, GATED if gated else MISSING, ", ".join(absent))
    broken = [f"{file}: {why}" for file in there if (why := damage(file))]
    return Found(needed, DAMAGED, "; ".join(broken)) if broken else Found(needed, state, where)


def _files(find: Find, group: Group) -> Iterator[tuple[str, Path | None]]:
    """The files of a group's first name that is there, or that all are missing."""
    for name in group:
        if (path := find(name)) is not None:
            yield name, path
            if name.endswith(INDEX):
                folder = name.rpartition("/")[0]
                shards = [f"{folder}/{shard}".lstrip("/") for shard in _shards(path)]
                yield from ((shard, find(shard)) for shard in shards)
            return
    yield group[0], None


def _shards(index: Path) -> list[str]:
    try:
        return shards_of(json.loads(index.read_text(encoding="utf-8")))
    except ValueError:
        return []  # as `damage` says
