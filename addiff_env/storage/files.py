"""Files and folders that several processes work in, on several machines if need be: who may write, and how.

Locks are the operating system's: whatever ends a process, a kill or a crash among it, lets go of what it held.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

LOCK = ".lock"
PROGRAM = ".program"  # begins the names of the locks that programs hold for as long as they run
REQUEUED = "SLURM_RESTART_COUNT"  # how often SLURM has queued this job again
PATIENCE = 300.0  # seconds that a requeued job waits for its predecessor: on NFS a dead node keeps its locks a while
LONGEST_NAME = 120  # characters: file systems take 255 bytes, encrypting ones 143
_UNSAFE = re.compile(r"[^A-Za-z0-9_.+-]+")
_HASHED = re.compile(r"(^|\.)[0-9a-f]{10}$")  # how the names end that `file_name` makes


class FolderBusyError(OSError):
    """Another program is at work in a folder, or on a file."""


class DiskFullError(OSError):
    """There is no room to write a file; says which, and how much is free there."""


# --------------------------------------------------------------------------- who may write


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait for, and hold, a folder's lock: what follows is done by one process at a time. A killed one lets go."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK):
        yield


@contextmanager
def claim(
    folder: Path, program: str, group: str = "", member: str = "", instead: str = "take another folder"
) -> Iterator[None]:
    """Hold a folder for ``program`` while open: a second one is refused, and has written nothing then.

    Args:
        folder: made if there is none.
        program: who holds it, for the message to others.
        group: programs of one group (shards of one split, workers of one search) work side by side.
        member: its name in the group, of which each is held once.
        instead: what the message says can be done.

    Raises:
        FolderBusyError: another process is at work there; says which, where, and since when.
    """
    folder.mkdir(parents=True, exist_ok=True)
    role = (file_name(group), file_name(member)) if group else ()
    with _hold(folder, PROGRAM, role, program, str(folder), instead):
        yield


@contextmanager
def claim_file(path: Path, program: str, instead: str = "name another file") -> Iterator[None]:
    """As `claim`, of a single file, which need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _hold(path.parent, "." + file_name(path.name), (), program, str(path), instead):
        yield


@contextmanager
def _hold(folder: Path, stem: str, role: tuple[str, ...], program: str, what: str, instead: str) -> Iterator[None]:
    """Hold the lock of ``role`` below ``stem``; locks are tried, taken and removed by one process at a time."""
    turn = folder / f"{stem}{LOCK}"
    path = folder / f"{'-'.join((stem, *role, 'held'))}{LOCK}"
    lock, deadline = FileLock(path, timeout=0), time.monotonic() + _patience()
    while True:
        with FileLock(turn):
            holder = _find_holder(folder, stem, role, path)
            if holder is None:
                lock.acquire()
                _words_of(path).write_text(_introduction(program))
                break
        if time.monotonic() >= deadline:
            raise FolderBusyError(f"another process is at work in {what}: {holder}; wait for it to end, or {instead}")
        time.sleep(1.0)
    try:
        yield
    finally:
        with suppress(FileNotFoundError), FileLock(turn):  # unless somebody removed the folder
            path.unlink(missing_ok=True)
            _words_of(path).unlink(missing_ok=True)
        lock.release()


def _find_holder(folder: Path, stem: str, role: tuple[str, ...], own: Path) -> str | None:
    """What is known of a process that ``role`` cannot work beside; None where there is none."""
    beside = f"{stem}-{role[0]}-" if role else None
    for path in sorted(folder.glob(f"{glob.escape(stem)}-*{LOCK}")):
        if beside and path != own and path.name.startswith(beside):
            continue
        if _is_held(path):
            words = _words_of(path)
            return words.read_text() if words.is_file() else "it does not say which"
    return None


def _is_held(path: Path) -> bool:
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def _words_of(lock: Path) -> Path:
    return lock.with_suffix(".txt")


def _introduction(program: str) -> str:
    return f"{program}, process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"


def _patience() -> float:
    return PATIENCE if os.environ.get(REQUEUED, "0") not in ("", "0") else 0.0


# --------------------------------------------------------------------------- how


@contextmanager
def told_when_full(path: Path) -> Iterator[None]:
    """While writing a file, or files of a folder: let what a full disk does to that say where it was.

    Raises:
        DiskFullError: in place of what Python, or a library, says of it, which names no file.
    """
    try:
        yield
    except DiskFullError:  # told already, of the file itself
        raise
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        if not _is_full(error):
            raise
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
        free = shutil.disk_usage(there).free / 2**20
        text = f"no space left to write {path}: {free:,.1f} MiB are free there"
        raise DiskFullError(errno.ENOSPC, text) from error


def _is_full(error: Exception) -> bool:
    number = getattr(error, "errno", None)
    if number is not None:
        return number in (errno.ENOSPC, errno.EDQUOT)
    return any(words in str(error) for words in _FULL)


# How libraries put it that hand no number on: HDF5 and safetensors, and PyTorch, which says nothing else.
_FULL = ("No space left on device", "os error 28", "PytorchStreamWriter failed writing")


def partial_of(path: Path) -> Path:
    """A name beside ``path`` that no other process uses, here or on another machine."""
    return path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """A file to write that takes ``path``'s place at the end: whoever reads it sees the old one or the new one.

    Where writing fails, the old one stays, and nothing beside it. What is ``durable`` is on the disk by then, so that a
    power cut leaves one of the two whole as well.
    """
    partial = partial_of(path)
    try:
        with told_when_full(path):
            yield partial
            if durable:
                _to_disk(partial)
            os.replace(partial, path)
            if durable:
                _to_disk(path.parent)  # the renaming itself
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, program: str) -> Iterator[Path]:
    """A folder to fill that takes ``path``'s place at the end; what was cut short leaves nothing there.

    Raises:
        ValueError: ``path`` is a file, or holds something. FolderBusyError: another process makes it.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{str(path)!r} is not empty: {program} takes a folder of its own")
    partial = path.with_name(f"{path.name}.partial")
    with claim_file(path, program):
        shutil.rmtree(partial, ignore_errors=True)  # of a program that was killed
        try:
            with told_when_full(path):
                partial.mkdir(parents=True)
                yield partial
                partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _to_disk(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_whole(path: Path, text: str) -> None:
    """Write a text file at once; see `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def keep_first(path: Path, text: str) -> None:
    """Write a file, unless another process was faster: whole or not at all, and never over another's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        with told_when_full(path):
            partial.write_text(text, encoding="utf-8")
            os.link(partial, path)
    except FileExistsError:
        pass
    finally:
        partial.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        FileNotFoundError, PermissionError, IsADirectoryError: as Python's own, which name it.
        ValueError: it is no UTF-8; with its name and the place.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error


def read_json(path: Path, kind: type = dict) -> Any:
    """What a JSON file holds, an object unless another ``kind`` is asked for.

    Raises:
        OSError: as `read_text`; ValueError: it is damaged or holds something else; with its name.
    """
    return parse_json(read_text(path), str(path), kind)


def parse_json(text: str | bytes, place: str, kind: type = dict) -> Any:
    """What JSON says, an object unless another ``kind`` is asked for; raises ValueError with its ``place``."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is damaged: {error}: {text[:80]!r}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{place} is damaged: expected {_KINDS.get(kind, kind.__name__)}, got {text[:80]!r}")
    return value


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, as OmegaConf has it.

    Raises:
        OSError: as `read_text`; ValueError: it is damaged; with its name.
    """
    from omegaconf import OmegaConf
    from yaml import YAMLError

    text = read_text(path)
    try:
        return OmegaConf.create(text)
    except (YAMLError, ValueError, AssertionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


_KINDS: dict[type, str] = {dict: "an object", list: "a list"}


def file_name(text: str, identity: str | None = None) -> str:
    """``text`` as the name of one file or folder, which every file system takes and no shell or Hydra has to quote.

    What is short and plain stays as it is. Anything else is made so, and told apart by a hash of the whole.

    Args:
        text: anything.
        identity: what ``text`` stands for, where others could look the same: then the hash, of this, is always there.
    """
    stem = _UNSAFE.sub("_", text).strip("._-")[:LONGEST_NAME]
    if identity is None and text and stem == text and not _HASHED.search(text):
        return text
    whole = text if identity is None else identity
    digest = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return f"{stem[: LONGEST_NAME - 11]}.{digest}".lstrip(".")
