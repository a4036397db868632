"""What a finished run keeps beside its rows, so that its report can be made again without any model.

`RunFolder` names the files. A recorded trajectory is a folder of its frames and masks as PNG, and ``strip.json``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np

from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.files import RunFolder
from addiff_env.evaluation.run.made_with import differing_values, read_fingerprint
from addiff_env.evaluation.run.rows import CONFIGURATION, read_rows
from addiff_env.evaluation.statistics.decision import Decision, Part, Rules
from addiff_env.evaluation.statistics.summary import lead_with
from addiff_env.evaluation.statistics.timings import MethodTiming, Timings, check_timings
from addiff_env.storage.files import read_json, write_whole
from addiff_env.storage.jsonl import read_objects
from addiff_env.storage.pictures import read_picture, save_picture
from addiff_env.types import ResultRow

LIBRARIES = ("torch", "diffusers", "transformers", "gymnasium", "numpy")
SETTINGS = (*CONFIGURATION, "code_version")  # of a method's rows
_KEPT = ("prompt", "seed", "category", "id", "num_requirements", "complexity")  # of an item
_BEFORE = {"facts": "num_requirements"}  # fields that earlier runs kept by another name


@dataclass(frozen=True)
class Trajectory:
    """A recorded trajectory: frames as `filmstrips.record_trajectories` gives them, and the checker's words."""

    item: Item
    reason: str
    frames: list[dict[str, Any]]

    @property
    def actions(self) -> list[int]:
        """Decisions taken, in order."""
        return [frame["action"] for frame in self.frames if frame["action"] is not None]


# --------------------------------------------------------------------------- who reports


def is_reported(folder: Path, settings: str, rows: Sequence[ResultRow]) -> bool:
    """Whether another process has reported the same rows with the same settings; see `mark_reported`."""
    path = RunFolder(folder).reported
    return path.exists() and path.read_text() == _digest(settings, rows)


def mark_reported(folder: Path, settings: str, rows: Sequence[ResultRow]) -> None:
    """Say that ``rows`` were reported with ``settings``, for the processes of one launch that end after this one."""
    write_whole(RunFolder(folder).reported, _digest(settings, rows))


def _digest(settings: str, rows: Sequence[ResultRow]) -> str:
    digest = hashlib.sha256(settings.encode())
    for row in rows:
        digest.update(json.dumps(asdict(row)).encode() + b"\n")
    return digest.hexdigest()


# --------------------------------------------------------------------------- items, verdicts, provenance


def write_items(folder: Path, items: Iterable[Item]) -> None:
    """Keep what the report needs to know of the benchmark."""
    lines = (json.dumps({name: getattr(item, name) for name in _KEPT}) + "\n" for item in items)
    write_whole(RunFolder(folder).items, "".join(lines))


def read_items(folder: Path) -> list[Item]:
    """The run's items, without the benchmark's own metadata."""
    path = RunFolder(folder).items
    return [_item(values, f"{path}:{k}") for k, values in enumerate(read_objects(path), 1)]


def _item(values: dict[str, Any], place: str) -> Item:
    """The item of a kept line's ``values``; raises ValueError with its ``place`` where they do not fit."""
    try:
        return Item(**{_BEFORE.get(name, name): value for name, value in values.items()})
    except TypeError as error:
        raise ValueError(f"{place} is damaged: {error}") from error


def write_verdicts(folder: Path, verdicts: Sequence[Decision], rules: Rules) -> None:
    """Keep the verdicts with the numbers behind them, and the rules that they were reached by."""
    kept = {"rules": asdict(rules), "verdicts": [asdict(verdict) for verdict in verdicts]}
    write_whole(RunFolder(folder).verdicts, json.dumps(kept, indent=2) + "\n")


def read_verdicts(folder: Path) -> list[Decision]:
    """The run's verdicts; none where no agent was evaluated."""
    path = RunFolder(folder).verdicts
    if not path.exists():
        return []
    found = read_json(path, object)
    try:
        found = found["verdicts"] if isinstance(found, dict) else found  # earlier releases kept no rules
        return [Decision(**{**values, "parts": tuple(Part(**part) for part in values["parts"])}) for values in found]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no verdicts: {type(error).__name__}: {error}") from error


def write_provenance(folder: Path, rows: Sequence[ResultRow], **values: Any) -> None:
    """Keep JSON-able ``values``, the settings of each method, and the versions of the libraries that ran them."""
    settings = {row.method: {part: getattr(row, part) for part in SETTINGS} for row in rows}
    libraries = {"python": python_version(), **{name: version(name) for name in LIBRARIES}}
    kept = {**values, "libraries": libraries, "methods": settings}
    write_whole(RunFolder(folder).provenance, json.dumps(kept, indent=2) + "\n")


def read_provenance(folder: Path) -> dict[str, Any]:
    """What `write_provenance` kept; empty where nothing was."""
    path = RunFolder(folder).provenance
    return read_json(path) if path.exists() else {}


def reported_rows(folder: Path) -> list[ResultRow]:
    """The rows that the run's last report was about: its file may hold those of other methods, items and code too.

    They carry timed seconds where the run was timed.

    Raises:
        ValueError: some of them are not there; a damaged file.
    """
    rows, kept = read_rows(RunFolder(folder).rows), read_provenance(folder)
    rows = with_timings(folder, _reported_only(folder, rows, kept.get("methods")))
    return lead_with(rows, kept["metric"]) if "metric" in kept else rows


def with_timings(folder: Path, rows: list[ResultRow]) -> list[ResultRow]:
    """The rows with timed seconds, where the run was timed; as they are elsewhere."""
    timings = usable_timings(folder, rows)
    return rows if timings is None else timings.onto(rows)


def _reported_only(folder: Path, rows: list[ResultRow], methods: dict[str, Any] | None) -> list[ResultRow]:
    if methods is None:
        return rows
    found = {(row.prompt, row.seed, row.method, *(getattr(row, part) for part in SETTINGS)): row for row in rows}
    items = read_items(folder)
    wanted = [
        (item.prompt, item.seed, name, *(settings[part] for part in SETTINGS))
        for name, settings in methods.items()
        for item in items
    ]
    missing = [key for key in wanted if key not in found]
    if missing:
        raise ValueError(f"{len(missing)} of {len(wanted)} reported rows are not in {folder}, e.g. {missing[0]}")
    return [found[key] for key in wanted]


# --------------------------------------------------------------------------- timings


def write_timings(folder: Path, timings: Timings) -> None:
    """Keep what the run's methods take, see `addiff_env.evaluation.run.timing`."""
    write_whole(RunFolder(folder).timings, json.dumps(asdict(timings), indent=2) + "\n")


def read_timings(folder: Path) -> Timings | None:
    """What `write_timings` kept; None where the run was not timed.

    Raises:
        ValueError: the file is damaged; with its path.
    """
    path = RunFolder(folder).timings
    if not path.exists():
        return None
    found = read_json(path)
    try:
        methods = {
            name: MethodTiming(**{**one, "seconds": tuple(map(float, one["seconds"]))})
            for name, one in found.pop("methods").items()
        }
        timings = Timings(methods=methods, **{**found, "sessions": tuple(found["sessions"])})
        check_timings(timings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} holds no timings: {type(error).__name__}: {error}") from error
    return timings


def usable_timings(folder: Path, rows: Sequence[ResultRow]) -> Timings | None:
    """The run's timings, as far as they are of what ``rows`` were made with; None where the run was not timed.

    Of a run with other settings (a file that was copied, say) no method counts as timed, and the reason is given.
    """
    timings = read_timings(folder)
    if timings is None or not timings.made_with:
        return timings
    for code_version in dict.fromkeys(row.code_version for row in rows):
        made_with = read_fingerprint(folder, code_version)
        if made_with and (other := differing_values(timings.made_with, made_with)):
            reason = f"what was timed has other settings ({'; '.join(other)})"
            return replace(timings, methods={}, untimed=dict.fromkeys([row.method for row in rows], reason))
    return timings


# --------------------------------------------------------------------------- filmstrips


def save_trajectories(folder: Path, trajectories: Sequence[Trajectory]) -> None:
    """Keep trajectories as pictures and numbers; those of an earlier report are replaced."""
    place = RunFolder(folder).trajectories
    shutil.rmtree(place, ignore_errors=True)
    for number, trajectory in enumerate(trajectories):
        _save_trajectory(place / f"{number:03d}", trajectory)


def _save_trajectory(folder: Path, trajectory: Trajectory) -> None:
    folder.mkdir(parents=True)
    kept = []
    for number, frame in enumerate(trajectory.frames):
        save_picture(folder / f"{number:03d}.png", frame["picture"])
        if frame["mask"] is not None:
            levels = np.rint(255 * np.asarray(frame["mask"], float)).astype(np.uint8)  # (h, w)
            save_picture(folder / f"{number:03d}-mask.png", levels)
        kept.append({name: value for name, value in frame.items() if name not in ("picture", "mask")})
    item = {name: getattr(trajectory.item, name) for name in _KEPT}
    (folder / "strip.json").write_text(
        json.dumps({"item": item, "reason": trajectory.reason, "frames": kept}, indent=2)
    )


def read_trajectories(folder: Path) -> list[Trajectory]:
    """The run's trajectories, in the order they were chosen; masks in [0, 1] to the nearest 1/255."""
    return [_read_trajectory(path.parent) for path in sorted(RunFolder(folder).trajectories.glob("*/strip.json"))]


def _read_trajectory(folder: Path) -> Trajectory:
    kept = read_json(folder / "strip.json")
    frames = []
    for number, frame in enumerate(kept["frames"]):
        picture = read_picture(folder / f"{number:03d}.png")  # (H, W, 3)
        path = folder / f"{number:03d}-mask.png"
        mask = read_picture(path, "L") / 255.0 if path.exists() else None  # (h, w)
        frames.append({**frame, "picture": picture, "mask": mask})
    return Trajectory(_item(kept["item"], str(folder / "strip.json")), kept["reason"], frames)
