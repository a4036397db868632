"""Sides that are timed in turns, and the figures that come of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from addiff_env.evaluation.run.machine import wait_for


def _nothing() -> None:
    """What a side without preparations needs."""


@dataclass(frozen=True)
class Side:
    """One of those that are timed in turns; ``prepare`` is not timed, nor is the ``first`` run (None: as others)."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] = _nothing
    first: Callable[[], Any] | None = None

    def begin(self) -> None:
        """The run that does not count: it makes what is made once."""
        self.prepare()
        (self.first or self.run)()


@dataclass(frozen=True)
class Figure:
    """A ratio, or what has a ``unit``: its median over the rounds and its extremes."""

    comparison: str
    name: str
    rounds: list[float]
    unit: str = ""
    median: float = field(init=False)
    low: float = field(init=False)
    high: float = field(init=False)

    def __post_init__(self) -> None:
        for name, of in (("median", statistics.median), ("low", min), ("high", max)):
            object.__setattr__(self, name, float(of(self.rounds)))


class Rounds:
    """Times sides in turns; Ctrl-C ends it, and whole rounds that were measured by then count.

    Args:
        number: how often each side is measured.
        device: what is waited for before and after.

    Attributes:
        interrupted: Ctrl-C was pressed: nothing more is timed.
    """

    def __init__(self, number: int, device: torch.device) -> None:
        self.number, self.device, self.interrupted = number, device, False

    def seconds(self, side: Side) -> float:
        """How long one run of a side takes."""
        side.prepare()
        wait_for(self.device)
        began = time.perf_counter()
        side.run()
        wait_for(self.device)
        return time.perf_counter() - began

    def in_turns(self, label: str, sides: dict[str, Side], number: int | None = None) -> dict[str, np.ndarray]:
        """Seconds (rounds,) of each side, after one run of each that does not count.

        Raises:
            KeyboardInterrupt: Ctrl-C, now or before, and no whole round was measured since.
        """
        names = list(sides)
        turns = [names[::-1] if turn % 2 else names for turn in range(number or self.number)]
        found = list(self.whole(label, turns, lambda name: self.seconds(sides[name]), sides.values()))
        if not found:
            raise KeyboardInterrupt
        return {name: np.array([turn[name] for turn in found]) for name in names}

    def whole(
        self,
        label: str,
        turns: Sequence[Sequence[str]],
        measure: Callable[[str], float],
        sides: Iterable[Side] = (),
    ) -> Iterator[dict[str, float]]:
        """What is measured of the names of each turn, turn by turn; Ctrl-C ends it after the last whole one.

        Before the first turn each of the ``sides`` begins.
        """
        if self.interrupted:
            raise KeyboardInterrupt
        beginning = list(sides)
        total = len(beginning) + sum(map(len, turns))
        with tqdm(total=total, desc=label, unit="run", leave=False, disable=None) as bar:
            try:
                for side in beginning:
                    side.begin()
                    bar.update()
                for turn in turns:
                    found = {}
                    for name in turn:
                        found[name] = measure(name)
                        bar.update()
                    yield found
            except KeyboardInterrupt:
                self.interrupted = True


def table(figures: Sequence[Figure]) -> str:
    """All figures as text, one a line."""
    width = max([len(figure.name) for figure in figures], default=0)
    lines = [f"{'comparison':<10}  {'of':<{width}}  median  [lowest, highest]"]
    for figure in figures:
        spread = f"[{figure.low:.3f}, {figure.high:.3f}]" if len(figure.rounds) > 1 else ""
        line = f"{figure.comparison:<10}  {figure.name:<{width}}  {figure.median:6.3f}  {spread}"
        lines.append(f"{line.rstrip()} {figure.unit}".rstrip())
    return "\n".join(lines)
