"""The pictures of the page: trajectories, failures, and what each method made of one prompt."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from addiff_env.env.trajectories import overlay
from addiff_env.evaluation.benchmarks.items import categories_in_turn
from addiff_env.evaluation.report.sections import subject_of
from addiff_env.evaluation.run.run_folder import Trajectory
from addiff_env.evaluation.statistics.summary import (
    NOT_AVAILABLE,
    by_method,
    headline_metric,
    score_value,
    share_metrics,
)
from addiff_env.storage.pictures import read_picture
from addiff_env.types import ACTIONS, ResultRow, SampleKey

MAX_FAILURES, MAX_SIDE = 12, 192  # pictures shown, and their largest side in pixels


# --------------------------------------------------------------------------- pictures


class Pictures:
    """A run's pictures as data URIs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    def of(self, row: ResultRow) -> str | None:
        """The picture of a row; None where it was not kept.

        Raises:
            ValueError: the row names a file outside the run folder.
        """
        if not row.image:
            return None
        path = (self.folder / row.image).resolve()
        if not path.is_relative_to(self.folder):
            raise ValueError(f"{row.image!r} lies outside the run folder {self.folder}")
        return png_uri(read_picture(path)) if path.exists() else None


def png_uri(picture: np.ndarray) -> str:
    """A picture uint8 (H, W, 3) as a data URI, made smaller where a side is longer than `MAX_SIDE`."""
    image = Image.fromarray(picture)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# --------------------------------------------------------------------------- galleries


class Cards:
    """Prompts with what each method made of them, side by side."""

    def __init__(self, rows: Sequence[ResultRow], folder: Path) -> None:
        self.pictures, self.metric = Pictures(folder), headline_metric(rows)
        self.is_share = self.metric in share_metrics(rows)  # passed or failed, as by the checker or GenEval's rules
        self.groups, self.subject = by_method(rows), subject_of(rows)
        self.by_place: dict[SampleKey, list[ResultRow]] = {}
        for row in rows:
            self.by_place.setdefault(_place(row), []).append(row)

    def trajectory(self, trajectory: Trajectory) -> dict[str, Any]:
        """A recorded trajectory, and the final pictures of every method for the same prompt and noise."""
        place = trajectory.item.prompt, trajectory.item.seed
        own = [row for row in self.by_place.get(place, []) if row.method == self.subject]
        return {
            "item": trajectory.item,
            "reason": trajectory.reason,
            "frames": [_frame(frame) for frame in trajectory.frames],
            "differs": any(row.actions != trajectory.actions for row in own),
            "made": self.made(place),
        }

    def made(self, place: SampleKey) -> list[dict[str, Any]]:
        """Final pictures of one prompt and noise, methods in order."""
        return [self._final(row) for row in self.by_place.get(place, [])]

    def _final(self, row: ResultRow) -> dict[str, Any]:
        value = score_value(row, self.metric)
        passed = _outcome(row, self.metric) if self.is_share else None
        words = row.reason or f"{self.metric} {NOT_AVAILABLE if value is None else f'{value:.3g}'}"
        return {"method": row.method, "uri": self.pictures.of(row), "passed": passed, "words": words, "nfe": row.nfe}

    def failures(self) -> dict[str, Any] | None:
        """What the agent failed, categories in turn, and who passed where it failed; None for graded scores."""
        if not self.is_share:
            return None
        own = {_place(row): row for row in self.groups[self.subject] if _outcome(row, self.metric) is not None}
        failed = [row for row in own.values() if not _outcome(row, self.metric)]
        others = {name: group for name, group in self.groups.items() if name != self.subject}
        shown = [row for (row,) in categories_in_turn([[row] for row in failed])][:MAX_FAILURES]
        return {
            "number": len(failed),
            "of": len(own),
            "balance": [(name, *_discordant(group, own, self.metric)) for name, group in others.items()],
            "cards": [{"row": row, "made": self.made(_place(row))} for row in shown],
        }


def _outcome(row: ResultRow, metric: str) -> bool | None:
    """Whether a picture passed; None where no metric says."""
    value = score_value(row, metric)
    return None if value is None else bool(value)


def _discordant(group: Sequence[ResultRow], own: Mapping[SampleKey, ResultRow], metric: str) -> tuple[int, int]:
    """Pictures that passed where the agent's ``own`` failed, and that failed where it passed."""
    both = [(_outcome(row, metric), _outcome(own[place], metric)) for row in group if (place := _place(row)) in own]
    return both.count((True, False)), both.count((False, True))


def _place(row: ResultRow) -> SampleKey:
    return row.prompt, row.seed


def _frame(frame: Mapping[str, Any]) -> dict[str, Any]:
    picture = frame["picture"] if frame["mask"] is None else overlay(frame["picture"], frame["mask"])
    action = "final" if frame["action"] is None else ACTIONS[frame["action"]]
    return {"uri": png_uri(picture), "action": action, "nfe": frame["nfe"], "score": frame["score"]}
