"""A folder of pictures with a row each, which a killed command goes on filling.

| file | what |
|---|---|
| ``images/000000.png`` | the picture of index 0 |
| ``previews/000000/00.png`` | on demand, what its first decision saw |
| ``rows.jsonl`` | a row per picture, or per failure; of several processes once one of them has ended |
| ``rows-0000-of-0002.jsonl`` | of several processes, what the first of them makes |

A picture is on the disk before its row is: what has a row is whole, and what has none is made again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from addiff_env.pipeline.output import GeneratedImage
from addiff_env.storage.files import alone_in, replacing
from addiff_env.storage.jsonl import append_objects, read_objects

ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Task:
    """A picture that is wanted, or (with an ``error``) what was found in its place."""

    index: int
    prompt: str
    seed: int = 0
    negative_prompt: str | None = None
    error: str = ""


class PictureFolder:
    """Keeps what one process makes, and knows what all have made."""

    def __init__(self, folder: Path, rows: Path) -> None:
        self.folder, self.rows = folder, rows
        self.done = {index: row for index, row in self.read().items() if self._is_whole(row)}

    def read(self) -> dict[int, dict[str, Any]]:
        """The rows of all processes, by index; of two for one index the later one in its file."""
        paths = sorted(self.folder.glob("rows*.jsonl"))
        return {row["index"]: row for path in paths for row in read_objects(path)}

    def _is_whole(self, row: dict[str, Any]) -> bool:
        return bool(row["error"]) or (self.folder / row["image"]).is_file()

    def keep(self, task: Task, made: GeneratedImage) -> None:
        """Write a picture and its row; one whose numbers were not finite counts as failed and leaves no picture."""
        if made.fault:
            return self.fail(task, made.note)
        name = f"{task.index:06d}"
        image = self._save(made.image, f"images/{name}.png")
        row = _row(task) | {
            "image": image,
            "nfe": made.nfe,
            "forward_passes": made.forward_passes,
            "net_flops": made.net_flops,
            "seconds": made.seconds,
            "actions": made.actions,
            "reward_score": made.reward_score if math.isfinite(made.reward_score) else None,
        }
        row |= {} if made.price is None else {"price": made.price}
        previews = [self._save(one, f"previews/{name}/{k:02d}.png") for k, one in enumerate(made.previews)]
        self._append(row | ({"previews": previews} if previews else {}))

    def fail(self, task: Task, error: str) -> None:
        """Write the row of a picture that there will not be."""
        self._append(_row(task) | {"error": error})

    def _append(self, row: dict[str, Any]) -> None:
        append_objects(self.rows, [row])
        self.done[row["index"]] = row

    def _save(self, image: Image.Image, name: str) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=True) as partial:
            image.save(partial, format="PNG")
        return name

    def merge(self) -> list[dict[str, Any]]:
        """Put what all processes have made so far into ``rows.jsonl``, in order; returns those rows."""
        with alone_in(self.folder):
            rows = [row for _, row in sorted(self.read().items())]
            with replacing(self.folder / ROWS, durable=True) as partial:
                append_objects(partial, rows)
        return rows


def _row(task: Task) -> dict[str, Any]:
    row = {"index": task.index, "prompt": task.prompt, "seed": task.seed, "error": ""}
    return row if task.negative_prompt is None else row | {"negative_prompt": task.negative_prompt}
