"""What the rows of a run folder were made with, beyond what each row says itself: kept there, and held to.

The first process of a code version that makes rows in a folder leaves ``made-with-<code version>.json``; whoever goes
on, makes another shard or merges has to have the same settings. Methods, further agents and a larger limit may be
added: rows are told apart by method, policy, prompt and seed. Rows of another code version are never taken for ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

from addiff_env.storage.files import keep_first, read_json
from addiff_env.storage.inputs import differing, flatten

CONTENTS, WEIGHTS_BEFORE = "contents", "weights"  # of the files that settings name; what earlier releases kept of them
BENCHMARK, MODEL = "benchmark.name", "environment.model"
OTHER_FOLDER = "take another folder: hydra.run.dir=..."
# Settings that change no picture, or that each row states itself.
HARMLESS = (
    *("prompts", "reward", "render_mode", "device", "dtype", "compile", "channels_last", "batch_size"),
    *("decode_memory", "offload"),
)
ADDED = ("metrics", "agents")  # named one by one: who goes on need not have all of them


@cache
def _defaults() -> dict[str, Any]:
    """What a folder of a release without a setting was made with: the setting's default."""
    from addiff_env.env.config import EnvConfig  # loads PyTorch, which a report without timings does not need
    from addiff_env.env.validation import plain

    return {
        f"environment.{field.name}": plain(field.default)
        for field in fields(EnvConfig)
        if field.default is not MISSING and field.name not in HARMLESS
    }


def differing_values(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Every value in which two fingerprints differ, in words.

    Of `ADDED` our names alone count, and of those no agent that they have not got. A file that lies elsewhere is the
    same if its contents are, except for the model, by whose name rows are told apart.
    """
    mine, others = (
        _defaults() | {name: value for name, value in flatten(tree).items() if value != {}} for tree in (ours, theirs)
    )
    names = [name for name in dict.fromkeys([*mine, *others]) if not _may_lack(name, mine, others)]
    now, before = ({name: values[name] for name in names if name in values} for values in (mine, others))
    return differing(now, before, ours.get(CONTENTS, {}), theirs.get(CONTENTS, {}), mine, by_name=[MODEL])


def _may_lack(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    group = name.partition(".")[0]
    if group in (CONTENTS, WEIGHTS_BEFORE):
        return True  # compared by themselves
    if name == BENCHMARK and name not in theirs:
        return True  # earlier releases did not say
    return (group in ADDED and name not in ours) or (group == "agents" and name not in theirs)


def keep_fingerprint(
    folder: Path, fingerprint: Mapping[str, Any], code_version: str, instead: str = OTHER_FOLDER
) -> None:
    """Leave ``fingerprint`` in a folder where ``code_version`` is about to make its first rows; else as `require_same`.

    Of shards that start at the same moment the first is believed.
    """
    keep_first(_path(folder, code_version), json.dumps(fingerprint, indent=2) + "\n")
    require_same(folder, fingerprint, code_version, instead)


def _path(folder: Path, code_version: str) -> Path:
    return folder / f"made-with-{code_version}.json"


def read_fingerprint(folder: Path, code_version: str) -> dict[str, Any] | None:
    """What the rows of ``code_version`` in a folder depend on; None where nothing was kept."""
    path = _path(folder, code_version)
    return read_json(path) if path.exists() else None


def require_same(folder: Path, fingerprint: Mapping[str, Any], code_version: str, instead: str = OTHER_FOLDER) -> None:
    """Check ``fingerprint`` against that of the rows which ``code_version`` made in a folder; without any all is well.

    Raises:
        ValueError: they were made with other settings; every differing value is named.
    """
    made_with = read_fingerprint(folder, code_version)
    if made_with is not None and (differing := differing_values(fingerprint, made_with)):
        raise ValueError(f"{folder} holds rows that were made with other settings ({'; '.join(differing)}); {instead}")
