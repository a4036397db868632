"""What shields frozen models from their surroundings: torch's global modes, and the other threads of the process.

Environments of one process share their frozen models, and torch keeps part of its settings per process. Three contexts
keep results what they are for one environment alone, in one thread, under torch's defaults:

- `isolated`: computing. Default dtype float32, no gradients, no autocast, no inference mode, new tensors on the CPU
  unless a device is named, whatever the caller has set; afterwards everything is the caller's again.
- `frozen`: computing with one model that others may hold, too: one thread at a time.
- `exclusive`: changing what is global, for a moment. No other thread of this package computes meanwhile, and the random
  number generators' state is afterwards what it was. Models are loaded in it, and FLOPs counted.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch

T = TypeVar("T")
_DTYPE = torch.float32  # torch's own default
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


class _Place(threading.local):
    """Where the running thread is."""

    isolated = False  # inside `isolated` or `exclusive`
    exclusive = False
    models = 0  # that it holds the locks of


class _Gate:
    """Any number of threads compute at once, or one thread has everything to itself; waiting for that goes first.

    While anybody is inside, the default dtype, which torch keeps per process, is float32.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.computing = self.waiting = self.inside = 0
        self.taken = False
        self.callers_dtype = _DTYPE

    def enter(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: not self.taken and not self.waiting)
            self.computing += 1
            self._pin()

    def leave(self) -> None:
        with self.changed:
            self.computing -= 1
            self._unpin()
            self.changed.notify_all()

    def take(self, computing: bool) -> None:
        """Wait until no other thread computes; one that is inside ``computing`` waits meanwhile."""
        with self.changed:
            self.computing -= computing
            self.waiting += 1
            self.changed.notify_all()
            try:
                self.changed.wait_for(lambda: not self.taken and not self.computing)
            except BaseException:
                self.computing += computing
                raise
            finally:
                self.waiting -= 1
                self.changed.notify_all()
            self.taken = True
            self._pin()

    def give(self, computing: bool) -> None:
        with self.changed:
            self.taken = False
            self.computing += computing
            torch.set_default_dtype(_DTYPE)  # a load that failed may leave the model's
            self._unpin()
            self.changed.notify_all()

    def _pin(self) -> None:
        if not self.inside:
            self.callers_dtype = torch.get_default_dtype()
            torch.set_default_dtype(_DTYPE)
        self.inside += 1

    def _unpin(self) -> None:
        self.inside -= 1
        if not self.inside and torch.get_default_dtype() == _DTYPE:  # else other code has set another one meanwhile
            torch.set_default_dtype(self.callers_dtype)


_place, _gate = _Place(), _Gate()
_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()


def _after_fork() -> None:
    """In a child process there is only the thread that forked: what others held is free."""
    inside, dtype = _gate.inside, _gate.callers_dtype
    _gate.__init__()  # type: ignore[misc]
    _locks.clear()
    if _place.isolated:
        _gate.computing, _gate.taken = int(not _place.exclusive), _place.exclusive
        _gate.inside, _gate.callers_dtype = 1, dtype
    elif inside:
        torch.set_default_dtype(dtype)


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def isolated() -> Iterator[None]:
    """Compute the same under whatever global modes of torch the caller has set; also a decorator: ``@isolated()``."""
    if _place.isolated:
        yield
        return
    _gate.enter()
    _place.isolated = True
    try:
        with _default_modes():
            yield
    finally:
        _place.isolated = False
        _gate.leave()


@contextmanager
def exclusive() -> Iterator[None]:
    """Have this package to oneself, to load a model or to change a setting that torch keeps for the whole process.

    Other threads' environments wait. The random state of torch, NumPy and Python is afterwards what it was before:
    libraries draw the weights that they are about to overwrite.

    Raises:
        RuntimeError: inside `frozen`: those who wait for that model would be waited for.
    """
    if _place.exclusive:
        yield
        return
    if _place.models:
        raise RuntimeError("a frozen model's call cannot load a model: load it before, where the model is made")
    computing = _place.isolated
    _gate.take(computing)
    _place.isolated = _place.exclusive = True
    try:
        with _default_modes(), _random_state_kept():
            yield
    finally:
        _place.isolated, _place.exclusive = computing, False
        _gate.give(computing)


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Compute with ``model``, which no other thread does meanwhile; a thread that holds it already goes on."""
    with isolated():
        lock = _locks.get(model)
        if lock is None:
            lock = _locks.setdefault(model, threading.RLock())
        with lock:
            _place.models += 1
            try:
                yield
            finally:
                _place.models -= 1


def frozen_call(method: Callable[..., T]) -> Callable[..., T]:
    """Make a method of a frozen model one that runs inside `frozen` (of its ``self``)."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> T:
        with frozen(self):
            return method(self, *args, **kwargs)

    return call


@contextmanager
def _default_modes() -> Iterator[None]:
    """The modes that torch keeps per thread, as they are in a fresh one; no gradients."""
    with ExitStack() as modes:
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            modes.enter_context(torch.device("cpu"))
        yield


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Give all random number generators of the process their state back."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
