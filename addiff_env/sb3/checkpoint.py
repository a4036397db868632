"""Checkpoints: a run that is killed at any moment goes on from the last one, and ends with the same weights.

A checkpoint is taken between two rollouts, after the update: there the rollout buffer is empty, and what decides the
future is the policy and its optimiser, the environment with every lane where it stands (rollouts have a fixed length
and cut through episodes), the observation waiting to be answered, the callbacks' memories and the random streams of
Python, NumPy, PyTorch, the prompt order and each lane. One file holds all of it; it is written beside the old one,
flushed to the disk and renamed over it, so that at every moment a whole checkpoint exists. It is read with
``torch.load(weights_only=True)``: tensors, numbers, strings, and nothing that could run.
"""

from __future__ import annotations

import csv
import random
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import (
    CSVOutputFormat,
    KVWriter,
    Logger,
    SummaryWriter,
    TensorBoardOutputFormat,
    make_output_format,
)

from addiff_env.sb3.callbacks import StatefulCallback
from addiff_env.sb3.vec_env import DenoiseVecEnv
from addiff_env.storage.files import replacing

FORMAT_VERSION = 2
FILE = "checkpoint.pt"


def training_state(model: Any, env: DenoiseVecEnv, callbacks: Mapping[str, StatefulCallback]) -> dict[str, Any]:
    """Everything that decides how the training goes on: tensors, numbers and strings only."""
    monitor = model.env
    return {
        "policy": model.policy.state_dict(),
        "optimizer": model.policy.optimizer.state_dict(),
        "num_timesteps": int(model.num_timesteps),
        "n_updates": int(model._n_updates),
        "progress_remaining": float(model._current_progress_remaining),
        "last_obs": torch.from_numpy(np.asarray(model._last_obs).copy()),
        "last_episode_starts": torch.from_numpy(np.asarray(model._last_episode_starts).copy()),
        "episodes": [{key: float(value) for key, value in row.items()} for row in model.ep_info_buffer],
        "monitor": {name: torch.from_numpy(getattr(monitor, name).copy()) for name in _MONITOR},
        "env": env.state_dict(),
        "callbacks": {name: callback.state_dict() for name, callback in callbacks.items()},
        "unlogged": _unlogged(model.logger),
        "random": random_state(),
    }


_MONITOR = ("episode_returns", "episode_lengths")


def load_training_state(
    state: dict[str, Any], model: Any, env: DenoiseVecEnv, callbacks: Mapping[str, StatefulCallback]
) -> None:
    """Put a freshly built training where `training_state` found it; the random streams last.

    Raises:
        ValueError: the state is that of another environment or of other callbacks (looks at held-out prompts aside,
            which have no part in what is learned).
    """
    if (set(state["callbacks"]) ^ set(callbacks)) - {"held_out"}:
        raise ValueError(f"the checkpoint has callbacks {sorted(state['callbacks'])}, this run {sorted(callbacks)}")
    model.policy.load_state_dict(state["policy"])
    model.policy.optimizer.load_state_dict(state["optimizer"])
    model.num_timesteps, model._n_updates = state["num_timesteps"], state["n_updates"]
    model._current_progress_remaining = state["progress_remaining"]
    env.load_state_dict(state["env"])
    model._last_obs = state["last_obs"].numpy().copy()
    model._last_episode_starts = state["last_episode_starts"].numpy().copy()
    model.ep_info_buffer = deque(state["episodes"], maxlen=model._stats_window_size)
    model.ep_success_buffer = deque(maxlen=model._stats_window_size)
    for name in _MONITOR:
        setattr(model.env, name, state["monitor"][name].numpy().copy())
    for name, callback in callbacks.items():
        if name in state["callbacks"]:
            callback.load_state_dict(state["callbacks"][name])
    for name, (value, excluded) in state["unlogged"].items():
        model.logger.record(name, value, exclude=tuple(excluded))
    set_random_state(state["random"])


def _unlogged(logger: Logger) -> dict[str, list[Any]]:
    """Numbers recorded since the last dump: those of the update, which the next rollout's dump will write."""
    numbers = {name: value for name, value in logger.name_to_value.items() if np.isscalar(value)}
    return {
        name: [value.item() if isinstance(value, np.generic) else value, list(logger.name_to_excluded[name] or ())]
        for name, value in numbers.items()
    }


def random_state() -> dict[str, Any]:
    """The global random streams of Python, NumPy and PyTorch (with every CUDA device's)."""
    legacy = np.random.get_state(legacy=False)
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": {
            "key": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
            "pos": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from a `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy = state["numpy"]
    key = numpy["key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, numpy["pos"], numpy["has_gauss"], numpy["gauss"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        for device, stream in enumerate(state["cuda"][: torch.cuda.device_count()]):  # this machine may have fewer
            torch.cuda.set_rng_state(stream, device)


# --------------------------------------------------------------------------- files


def save_checkpoint(
    path: Path, state: dict[str, Any], config: str, inputs: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write a checkpoint atomically and durably.

    ``config`` is the run's resolved configuration, as text; ``inputs`` the fingerprints of the files that it names.
    """
    content = _plain({"format_version": FORMAT_VERSION, "config": config, "inputs": inputs, **state})
    with replacing(path, durable=True) as partial:
        torch.save(content, partial)


def _plain(tree: Any) -> Any:
    """``tree`` of what ``weights_only`` reads back: tensors, Python's own numbers, strings, lists and dicts.

    Raises:
        TypeError: something else is in it, which a reader would refuse; better to hear of it when writing.
    """
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_plain(value) for value in tree]
    if isinstance(tree, np.generic):
        return tree.item()
    if tree is None or isinstance(tree, (torch.Tensor, bool, int, float, str)):
        return tree
    raise TypeError(f"a checkpoint holds tensors, numbers and strings, got {type(tree).__name__}: {str(tree)[:80]}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; nothing in it is executed.

    Raises:
        ValueError: damaged, not a checkpoint, or of another format version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch's reader raises whatever the damage leads it to
        raise ValueError(f"{path} is no readable checkpoint; resume=false starts anew ({error})") from error
    version = state.get("format_version") if isinstance(state, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has checkpoint format {version!r}, this release reads {FORMAT_VERSION}")
    return state


class Checkpoints(BaseCallback):
    """Save the training to ``path`` before every ``every``-th rollout, and when it is complete."""

    def __init__(
        self,
        path: Path,
        env: DenoiseVecEnv,
        callbacks: Mapping[str, StatefulCallback],
        config: str,
        every: int = 1,
        inputs: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"checkpoints must be at least 1 rollout apart, got {every}")
        self.path, self.env, self.remembered, self.config, self.every = path, env, callbacks, config, every
        self.inputs = inputs
        self._rollouts = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self._rollouts % self.every == 0 and (self._rollouts or self.model.num_timesteps == 0):
            self.save()
        self._rollouts += 1

    def _on_training_end(self) -> None:
        """Complete, or given up by the alarm, which has to be known next time; else the last rollout's state stands."""
        alarm = self.remembered.get("alarm")
        if self.model.num_timesteps >= self.model._total_timesteps or getattr(alarm, "collapsed", None):
            self.save()

    def save(self) -> None:
        """Save now; only between rollouts does the state hold everything."""
        save_checkpoint(self.path, training_state(self.model, self.env, self.remembered), self.config, self.inputs)


# --------------------------------------------------------------------------- logs that go on


class _TensorBoard(TensorBoardOutputFormat):
    """SB3's, but what was logged after the last checkpoint, or by another run in the folder, is hidden."""

    def __init__(self, folder: str, step: int) -> None:
        self.writer = SummaryWriter(log_dir=folder, purge_step=step + 1)
        self._is_closed = False


def make_logger(folder: Path, formats: list[str], step: int = 0) -> Logger:
    """A logger into ``folder`` that goes on after ``step`` timesteps: later rows of an interrupted run are dropped.

    Raises:
        ValueError: an unknown format.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writers: list[KVWriter] = [_make_writer(name, folder, step) for name in formats]
    return Logger(folder=str(folder), output_formats=writers)


def _make_writer(name: str, folder: Path, step: int) -> KVWriter:
    if name == "csv":
        return _continued_csv(folder / "progress.csv", step)
    if name == "tensorboard":
        return _TensorBoard(str(folder), step)
    if name == "stdout":
        return make_output_format(name, str(folder))
    raise ValueError(f"unknown log format {name!r}; known: stdout, csv, tensorboard")


def _continued_csv(path: Path, step: int) -> CSVOutputFormat:
    """SB3's CSV writer, which starts an empty file, with the rows up to ``step`` put back; never is the file half."""
    rows: list[dict[str, str | None]] = []
    if step and path.is_file():
        with path.open(newline="") as file:
            try:
                rows = [row for row in csv.DictReader(file) if float(row.get("time/total_timesteps") or "inf") <= step]
            except (ValueError, csv.Error) as error:
                raise ValueError(f"{path} is damaged: {error}; remove it to go on without the rows so far") from error
    with replacing(path) as partial:  # the open file goes along
        writer = CSVOutputFormat(str(partial))
        for row in rows:
            numbers = {key: float(value) for key, value in row.items() if key and value}
            writer.write(numbers, dict.fromkeys(numbers, ()))
    return writer
