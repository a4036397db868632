"""What was measured of each method's pictures together, as a finished run keeps it.

``protocols.json`` holds the numbers that benchmarks with a protocol of their own report, ``set_metrics.json`` FID, KID
and CMMD; `evaluate.py` writes them where they were asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.files import RunFolder
from addiff_env.evaluation.run.rows import CONFIGURATION
from addiff_env.storage.files import read_json
from addiff_env.types import ResultRow

SPREAD = {"kid": "kid_std"}  # a set metric's standard deviation over random subsets, by the metric
_NO_METRIC = ("pictures", *SPREAD.values())
OVERALL = "overall"  # GenEval's headline number: the mean over tags


@dataclass(frozen=True)
class SetResults:
    """Numbers of whole sets of pictures; empty where none were measured."""

    protocols: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # metric, method, category -> mean
    sets: dict[str, dict[str, float]] = field(default_factory=dict)  # method, metric -> value; ``pictures`` beside them
    references: dict[str, dict[str, Any]] = field(default_factory=dict)  # network -> what it was measured against
    notes: list[str] = field(default_factory=list)  # which set metrics are not available, and why

    def __bool__(self) -> bool:
        return bool(self.protocols or self.sets)

    def set_names(self) -> list[str]:
        """Names of the set metrics, in order."""
        return list(dict.fromkeys(name for values in self.sets.values() for name in values if name not in _NO_METRIC))

    def categories(self, metric: str) -> list[str]:
        """Categories (or tags) of a protocol, the overall number first."""
        names = dict.fromkeys(name for means in self.protocols[metric].values() for name in means)
        return sorted(names, key=lambda name: name != OVERALL)

    def lines(self) -> Iterator[tuple[str, str, str, float | None, float, float | None]]:
        """Method, metric, category, pictures, value and standard deviation (over subsets); None where not known."""
        for metric, methods in self.protocols.items():
            for method, means in methods.items():
                yield from ((method, metric, category, None, value, None) for category, value in means.items())
        for name in self.set_names():
            for method, values in self.sets.items():
                if name in values:
                    yield method, name, "", values.get("pictures"), values[name], values.get(SPREAD.get(name, ""))


def pictures_of(rows: Sequence[ResultRow], items: Sequence[Item]) -> dict[str, str]:
    """Every method's pictures of ``items``, as a digest: which they are, and by what they were made."""
    places = [(item.prompt, item.seed) for item in items]
    made_by = {row.method: [getattr(row, part) for part in (*CONFIGURATION, "code_version")] for row in rows}
    return {name: sha256(json.dumps([places, by]).encode()).hexdigest()[:16] for name, by in made_by.items()}


def read_set_results(folder: Path, rows: Sequence[ResultRow], items: Sequence[Item]) -> SetResults:
    """What a run folder keeps of the methods of ``rows``; files that are not there hold nothing.

    Set metrics of other pictures, measured before the run grew or the code changed, are left out.
    """
    protocols, sets = _read(RunFolder(folder).protocols), _read(RunFolder(folder).set_metrics)
    now = pictures_of(rows, items)
    of = {metric: {name: found[name] for name in now if name in found} for metric, found in protocols.items()}
    measured, measured_on = sets.get("methods", {}), sets.get("measured_on", now)  # earlier releases did not say
    same = [name for name, pictures in now.items() if name in measured and measured_on.get(name) == pictures]
    return SetResults(
        {metric: found for metric, found in of.items() if found},
        {name: measured[name] for name in same},
        sets.get("references", {}) if same else {},
        sets.get("notes", []) if same else [],
    )


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
