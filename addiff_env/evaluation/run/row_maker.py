"""How rows are made: a method's pictures, their scores, and what they cost, appended as they come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.base import Method
from addiff_env.evaluation.metrics.base import Metric, columns_of, score_pictures, unmeasured
from addiff_env.evaluation.run.memory import watched
from addiff_env.evaluation.run.progress import RunProgress
from addiff_env.evaluation.run.rows import append_rows, read_rows
from addiff_env.evaluation.run.version import code_version, model_revision
from addiff_env.storage.files import file_name
from addiff_env.storage.pictures import save_picture
from addiff_env.types import Generated, ResultRow


def made_by(method: Method) -> dict[str, Any]:
    """Backbone with its revision, solver, policy and dtype, as a method's rows state them."""
    backbone = method.backbone
    return {
        "backbone": f"{backbone.name}@{model_revision(backbone.name, backbone.revision)}",
        "solver": method.solver,
        "policy": method.policy,
        "dtype": backbone.dtype_name,
    }


class RowMaker:
    """Makes and keeps the rows of one file: those that are missing, with the picture's scores and costs.

    Args:
        path: the file, of a run folder; what it holds is not made again.
        env: of the agent, whose settings rows state.
        metrics: of each picture.
        save_images: keep the pictures in the run folder, below ``images``.
    """

    def __init__(
        self, path: Path, env: DiffusionDenoiseVectorEnv, metrics: Sequence[Metric], save_images: bool
    ) -> None:
        self.folder, self.env, self.metrics, self.save_images = path.parent, env, metrics, save_images
        self.path, self.version = path, code_version()
        self.rows = read_rows(self.path)

    def blank_row(self, method: Method, item: Item) -> ResultRow:
        """A row that names the measurement and holds no result yet."""
        return ResultRow(
            method=method.name,
            prompt=item.prompt,
            seed=item.seed,
            category=item.category,
            **made_by(method),
            code_version=self.version,
            negative_prompt=self.env.config.negative_prompt,
            price=getattr(method, "price", None),
        )

    def require_scores(self, method: Method, items: Sequence[Item]) -> None:
        """Check that the rows which are there have every score that is wanted, before any more are made.

        Raises:
            ValueError: some lack one.
        """
        done = {row.key: row for row in self.rows}
        for item in items:
            row = done.get(self.blank_row(method, item).key)
            wanted = [name for name in columns_of(self.metrics, item) if row and unmeasured(name) not in row.reason]
            if row and (lacking := set(wanted) - set(row.scores)):
                raise ValueError(
                    f"{self.path} holds rows of {method.name!r} without {', '.join(sorted(lacking))}: it was made with "
                    "other metrics; take another folder: hydra.run.dir=..."
                )

    def require_one_version(self, methods: Sequence[Method]) -> None:
        """Check that a shard's file has rows of today's code only: a merge takes rows of one version.

        Raises:
            ValueError: it has others of ``methods``.
        """
        names = {method.name for method in methods}
        if others := {row.code_version for row in self.rows if row.method in names} - {self.version}:
            raise ValueError(
                f"{self.path} holds rows of code version {', '.join(sorted(others))}, this is {self.version}, and a "
                "merge takes rows of one version: take another folder (hydra.run.dir=...), or the code of before"
            )

    def kept(self, method: Method, items: Sequence[Item]) -> list[ResultRow]:
        """The method's rows for ``items`` that are there."""
        done = {row.key: row for row in self.rows}
        return [done[key] for item in items if (key := self.blank_row(method, item).key) in done]

    def run(self, method: Method, items: Sequence[Item], progress: RunProgress) -> list[ResultRow]:
        """Make what is missing; returns the method's rows for ``items``, in their order.

        Raises:
            ValueError: rows that are there lack a score that is wanted.
        """
        self.require_scores(method, items)
        done = {row.key: row for row in self.rows}
        wanted = [self.blank_row(method, item) for item in items]
        left = [item for item, row in zip(items, wanted, strict=True) if row.key not in done]
        for group, peak in watched(method.make(left) if left else (), method.backbone.device):
            rows = self._keep(method, group, peak)
            done |= {row.key: row for row in rows}
            progress.add(method.name, rows)
        self.rows = list(done.values())
        return [done[row.key] for row in wanted]

    def _keep(self, method: Method, group: list[tuple[Item, Generated]], peak_memory: int) -> list[ResultRow]:
        if not group:
            return []
        items = [item for item, _ in group]
        scored = score_pictures(self.metrics, np.stack([made.picture for _, made in group]), items)
        rows = []
        for (item, made), (scores, reason) in zip(group, scored, strict=True):
            row = self.blank_row(method, item)
            row.actions, row.nfe, row.forward_passes = made.actions, made.nfe, made.forward_passes
            row.net_flops, row.seconds, row.peak_memory = made.net_flops, made.seconds, peak_memory
            row.scores, row.reason = scores, "; ".join(filter(None, (made.note, reason)))
            row.image = self._save_image(row, made) if self.save_images else ""
            rows.append(row)
        append_rows(self.path, rows)
        return rows

    def _save_image(self, row: ResultRow, made: Generated) -> str:
        # By the row's whole key: a folder may hold the same picture in two dtypes, or of two code versions.
        digest = hashlib.sha256(json.dumps(row.key).encode()).hexdigest()[:12]
        relative = Path("images") / file_name(row.method) / f"{row.seed}-{digest}.png"
        save_picture(self.folder / relative, made.picture)
        return str(relative)
