"""A full disk: the error says which file and how much is free, and what was written before it stays."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from PIL import Image
from safetensors import SafetensorError

from addiff_env.agent import Agent, PolicyNet
from addiff_env.env import DiffusionDenoiseVectorEnv
from addiff_env.env.baseline_cache import BaselineCache, compute_baselines
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.registry import make_method
from addiff_env.evaluation.metrics.registry import open_metrics
from addiff_env.evaluation.run.progress import RunProgress
from addiff_env.evaluation.run.row_maker import RowMaker
from addiff_env.evaluation.run.rows import read_rows
from addiff_env.sb3.checkpoint import save_checkpoint
from addiff_env.storage.commands import interruptible
from addiff_env.storage.files import DiskFullError, keep_first, told_when_full, write_whole
from addiff_env.storage.jsonl import append_objects, read_objects
from addiff_env.storage.pictures import save_picture

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
GREY = np.full((8, 8, 3), 99, np.uint8)
TOLD = r"no space left to write {}[/\w.]*: [\d,.]+ MiB are free there"


def full(*args: Any, **kwargs: Any) -> Any:
    raise FULL


def bundle(path: Path) -> None:
    parts = {"a": 2, "b": 1}
    Agent(PolicyNet(parts), {"observation": parts, "hidden": 128}).save(path)


def checkpoint(path: Path) -> None:
    save_checkpoint(path, {"weights": torch.zeros(3)}, "")


# --------------------------------------------------------------------------- every way to write


def test_a_device_that_is_full() -> None:
    """The kernel's own: whatever is written to it finds no room."""
    device = Path("/dev/full")
    if not device.exists():
        pytest.skip("no /dev/full")
    with pytest.raises(DiskFullError, match=TOLD.format("/dev/full")):
        with told_when_full(device), device.open("w") as file:
            file.write("x")


WRITERS: dict[str, tuple[Callable[[Path], Any], str]] = {  # what writes, and what of it finds no room
    "text": (lambda path: write_whole(path, "new"), "pathlib.Path.write_text"),
    "first": (lambda path: keep_first(path, "new"), "pathlib.Path.write_text"),
    "rows": (lambda path: append_objects(path, [{"a": 2}]), "os.fsync"),
    "picture": (lambda path: save_picture(path, GREY), "PIL.Image.Image.save"),
    "bundle": (bundle, "pathlib.Path.write_bytes"),
    "checkpoint": (checkpoint, "torch.save"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_file_is_named_and_nothing_half_written_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write, at = WRITERS[name]
    monkeypatch.setattr(at, full)
    with pytest.raises(DiskFullError, match=TOLD.format(str(tmp_path / "it"))) as error:
        write(tmp_path / "it")
    assert error.value.errno == errno.ENOSPC
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == ([tmp_path / "it"] if name == "rows" else [])


@pytest.mark.parametrize("name", ["text", "checkpoint", "bundle"])
def test_what_stood_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write, at = WRITERS[name]
    write(tmp_path / "it")
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(at, full)
    with pytest.raises(DiskFullError):
        write(tmp_path / "it")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == whole


def test_rows_before_a_torn_one_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    append_objects(path, [{"a": 1}])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="rows.jsonl"):
        append_objects(path, [{"a": 2}])
    path.write_bytes(path.read_bytes()[:-3])  # a part of the row did find room
    monkeypatch.undo()
    assert read_objects(path) == [{"a": 1}]
    append_objects(path, [{"a": 3}])
    assert read_objects(path) == [{"a": 1}, {"a": 3}]


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EDQUOT, "quota"),
        OSError("Can't write data (errno = 28, error message = 'No space left on device')"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
)
def test_however_a_library_puts_it(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(DiskFullError, match=TOLD.format(str(tmp_path / "no" / "such"))),
        told_when_full(tmp_path / "no" / "such"),
    ):
        raise error


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), ValueError("7"), RuntimeError("CUDA"), KeyError("x")])
def test_other_errors_stay_what_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, told_when_full(tmp_path):
        raise error
    assert raised.value is error


def test_a_command_says_what_was_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(DiskFullError, match=f"{tmp_path}.* MiB .*; 3 rows are kept; make room"),
        interruptible(lambda: "3 rows are kept"),
        told_when_full(tmp_path),
    ):
        raise FULL


# --------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def env(small_kwargs: dict[str, Any]) -> DiffusionDenoiseVectorEnv:
    made = gym.make_vec(
        "AdDiffusion-Tiny-v0", 2, autoreset_mode=AutoresetMode.DISABLED, **{**small_kwargs, "batch_size": 2}
    ).unwrapped
    assert isinstance(made, DiffusionDenoiseVectorEnv)
    return made


@pytest.mark.parametrize("at", ["picture", "row"])
def test_rows_and_pictures_of_an_evaluation_stay_and_it_goes_on(
    env: DiffusionDenoiseVectorEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """The disk fills with the second batch of two."""
    items = [Item(f"a star {seed}", seed, "any") for seed in range(4)]
    metrics, _ = open_metrics(["clip_score"], env.perception, items)
    method, path = make_method("ddim-2", env), tmp_path / "rows.jsonl"

    def run() -> Any:
        progress = RunProgress({method.name: 2.0}, len(items))
        progress.start()
        try:
            return RowMaker(path, env, metrics, save_images=True).run(method, items, progress)
        finally:
            progress.close()

    save, calls = Image.Image.save, []

    def fills(picture: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) > 3:
            raise FULL
        save(picture, *args, **kwargs)

    sync, syncs = os.fsync, []

    def fills_later(file: int) -> None:
        syncs.append(1)
        if len(syncs) > 1:
            raise FULL
        sync(file)

    monkeypatch.setattr(Image.Image, "save", fills) if at == "picture" else monkeypatch.setattr(
        os, "fsync", fills_later
    )
    with pytest.raises(DiskFullError, match=str(tmp_path)):
        run()
    monkeypatch.undo()
    kept = read_rows(path)
    assert [row.seed for row in kept][:2] == [0, 1] and all((tmp_path / row.image).is_file() for row in kept)
    rows = run()
    assert rows[:2] == kept[:2] and [row.seed for row in read_rows(path)] == [0, 1, 2, 3]


def test_baselines_that_were_scored_stay(
    env: DiffusionDenoiseVectorEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, calls = BaselineCache.put, []

    def fills(cache: BaselineCache, *row: Any) -> None:
        calls.append(row)
        if len(calls) > 2:
            raise FULL
        put(cache, *row)

    monkeypatch.setattr(BaselineCache, "put", fills)
    path = tmp_path / "baselines.jsonl"
    with pytest.raises(DiskFullError, match=TOLD.format(str(path))):
        compute_baselines(path, env, 2, ["a star", "a ring"], [0, 1])
    monkeypatch.undo()
    assert len(read_objects(path)) == 3  # a header and two rows
    compute_baselines(path, env, 2, ["a star", "a ring"], [0, 1])
    assert len(read_objects(path)) == 5
