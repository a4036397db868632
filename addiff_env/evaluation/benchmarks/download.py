"""Fetch a public benchmark's prompts from their home, laid out as `benchmarks.SOURCES` reads them.

    addiff download geneval data
    ADDIFF_DATA=data python evaluate.py benchmark.name=geneval ...

A list is put in place only when it is whole: as many prompts as were published, of every category, and every line of
T2I-CompBench's lists of relations a prompt of its.
"""

from __future__ import annotations

import argparse
import http.client
import os
import shutil
import tempfile
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from addiff_env.evaluation.benchmarks.readers import SOURCES, T2I_CATEGORIES, Source, read_list

TIMEOUT = 30.0  # seconds without any answer
_RAW = "https://raw.githubusercontent.com"
_RELATIONS = ("complex_val_spatial.txt", "complex_val_action.txt")  # prompts of complex_val.txt, by what they ask for
_T2I = (*(f"{name}_val.txt" for name in T2I_CATEGORIES), *_RELATIONS)
FILES: dict[str, dict[str, str]] = {  # where each file of a list lies below the data folder, and where it comes from
    "coco-30k": {"coco/captions_val2014.json": SOURCES["coco-30k"].home},  # an archive of 241 MB, of which one is kept
    "coco-8k": {"coco/coco_8k_captions.txt": f"{_RAW}/openai/dalle3-eval-samples/main/prompts/8k_coco.txt"},
    "drawbench": {"drawbench/drawbench.txt": f"{_RAW}/openai/dalle3-eval-samples/main/prompts/drawbench.txt"},
    "partiprompts": {"partiprompts/PartiPrompts.tsv": SOURCES["partiprompts"].home},
    "geneval": {
        "geneval/evaluation_metadata.jsonl": f"{_RAW}/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl"
    },
    "geneval2": {"geneval2/geneval2_data.jsonl": f"{_RAW}/facebookresearch/GenEval2/main/geneval2_data.jsonl"},
    "t2i-compbench": {
        f"t2i_compbench/{name}": f"{_RAW}/Karine-Huang/T2I-CompBench/main/examples/dataset/{name}" for name in _T2I
    },
}


class FetchError(RuntimeError):
    """A list could not be had; nothing was put in place."""


def fetch(name: str, folder: Path, timeout: float = TIMEOUT) -> list[Path]:
    """Download a benchmark's lists into a data folder; returns their paths. Files that are there are replaced.

    Raises:
        FetchError: no answer, or a list that is not the published one.
        ValueError: an unknown benchmark.
    """
    if name not in FILES:
        raise ValueError(f"no public list of {name!r}; known: {', '.join(FILES)}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
        for relative, url in FILES[name].items():
            _download(url, Path(temporary, relative), folder / relative, timeout)
        _check(SOURCES[name], Path(temporary))
        for relative in FILES[name]:
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(temporary, relative), folder / relative)
    return [folder / relative for relative in FILES[name]]


def _download(url: str, path: Path, target: Path, timeout: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    archive = url.endswith(".zip")
    received = path.with_name("archive.zip") if archive else path
    try:
        _receive(url, received, timeout)
        if archive:
            _unpack(received, path)
    # URLError and timeouts are OSErrors
    except (OSError, EOFError, http.client.HTTPException, zipfile.BadZipFile) as error:
        raise FetchError(f"cannot fetch {url}: {error}; put it by hand to {target}") from error


def _receive(url: str, path: Path, timeout: float) -> None:
    with urllib.request.urlopen(url, timeout=timeout) as answer, path.open("wb") as file:  # noqa: S310 (ours)
        shutil.copyfileobj(answer, file)
        if answer.length:  # what is left of Content-Length, where it was given: copying just ends there
            raise EOFError(f"the connection ended {answer.length} bytes too early")


def _unpack(archive: Path, path: Path) -> None:
    """The one file of the archive that has the name of ``path``; the archive is removed."""
    with zipfile.ZipFile(archive) as opened:
        members = [name for name in opened.namelist() if name.rpartition("/")[2] == path.name]
        if len(members) != 1:
            raise zipfile.BadZipFile(f"{len(members)} files called {path.name} in it")
        with opened.open(members[0]) as member, path.open("wb") as file:
            shutil.copyfileobj(member, file)
    archive.unlink()


def _check(source: Source, folder: Path) -> None:
    """Refuse a list of another length than published, or with categories of unequal length where all have the same."""
    place = folder / source.paths[0]
    try:
        entries = source.read(place)
    except (ValueError, KeyError) as error:
        raise FetchError(
            f"not the published list: {str(error).replace(str(folder), '')}; from {source.home}"
        ) from error
    counts = Counter(entry.category for entry in entries)
    uneven = set(counts) == set(T2I_CATEGORIES) and len(set(counts.values())) > 1
    if len(entries) != source.number or uneven:
        shown = f" ({dict(counts)})" if len(counts) <= len(T2I_CATEGORIES) else ""
        raise FetchError(f"{len(entries)} prompts{shown}, the published list has {source.number}; from {source.home}")
    if source is SOURCES["t2i-compbench"]:
        _check_relations({entry.prompt for entry in entries if entry.category == "complex"}, place)


def _check_relations(prompts: set[str], folder: Path) -> None:
    """Refuse a list of relations with a line that is no complex prompt: cut within a line, or another version's."""
    home = SOURCES["t2i-compbench"].home
    for name in _RELATIONS:
        try:
            unexpected = [entry.prompt for entry in read_list(folder / name) if entry.prompt not in prompts]
        except ValueError as error:
            raise FetchError(f"not the published list: {str(error).replace(str(folder), '')}; from {home}") from error
        if unexpected:
            raise FetchError(f"{name} has {len(unexpected)} lines of no prompt, e.g. {unexpected[0]!r}; from {home}")


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch the lists that are named; returns the exit status."""
    text = "Fetch a public benchmark's prompts into a data folder."
    parser = argparse.ArgumentParser(prog="addiff download", description=text)
    parser.add_argument("name", choices=FILES, help="of the benchmark")
    parser.add_argument("folder", type=Path, help="data folder: ADDIFF_DATA, or benchmark.root of evaluate.py")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, metavar="S", help="seconds without any answer")
    options = parser.parse_args(argv)
    try:
        for path in fetch(options.name, options.folder, options.timeout):
            print(path)
    except FetchError as error:
        raise OSError(f"{options.name}: {error}") from error
    return 0
