"""How far a run is and how long the rest takes: one bar over all its pictures, which weigh by their evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

from tqdm import tqdm

from addiff_env.evaluation.statistics.summary import counted
from addiff_env.types import ResultRow

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, about {remaining} left"


class RunProgress:
    """One bar for the pictures of all methods, weighted by the denoiser evaluations that each takes.

    What a policy spends is known once it has made pictures: then their mean replaces what was expected, and the bar's
    length with it.

    Args:
        expected: of each method, by name, the evaluations of one picture; a guess where a policy decides.
        pictures: that each method makes, those that are there already included.
        clock: seconds, for tests.
    """

    def __init__(
        self, expected: Mapping[str, float], pictures: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.expected, self.pictures, self._clock = dict(expected), pictures, clock
        self._nfe: dict[str, list[int]] = {name: [] for name in expected}
        self._bar: tqdm | None = None
        self._kept, self._began = 0.0, 0.0

    def keep(self, name: str, rows: Sequence[ResultRow]) -> None:
        """Count a method's pictures that an earlier run made."""
        self._nfe[name] += [row.nfe for row in rows]

    def start(self) -> None:
        """Say how much there is to do, and begin to measure how fast it goes."""
        self._kept, self._began = self.done, self._clock()
        if left := sum(self.pictures - len(spent) for spent in self._nfe.values()):
            work = f"{counted(left, 'picture')} by {counted(len(self.expected), 'method')}"
            work += f", about {self.total - self.done:,.0f} evaluations"
            print(f"{work} of the denoiser in all; how long that takes is said after the first batch")
            self._bar = tqdm(total=self.total, initial=self.done, bar_format=_FORMAT, smoothing=0)

    def add(self, name: str, rows: Sequence[ResultRow]) -> None:
        """Count pictures that were just made."""
        first = self.done == self._kept
        self._nfe[name] += [row.nfe for row in rows]
        if self._bar is None or not rows:
            return
        if first:
            self._bar.write(self._estimate(len(rows)))
        self._bar.total, self._bar.n = self.total, self.done
        self._bar.set_description_str(f"{name} {len(self._nfe[name])}/{self.pictures}", refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        """End the bar where it is."""
        if self._bar is not None:
            self._bar.close()

    @property
    def total(self) -> float:
        """Evaluations of the whole run, as far as they are known."""
        return sum(self.pictures * self._each(name) for name in self.expected)

    @property
    def done(self) -> float:
        """Evaluations of the pictures that are there."""
        return sum(len(spent) * self._each(name) for name, spent in self._nfe.items())

    @property
    def seconds_left(self) -> float:
        """Seconds that the rest takes at the mean speed since `start`; only once a batch was made."""
        return (self._clock() - self._began) / (self.done - self._kept) * (self.total - self.done)

    def _each(self, name: str) -> float:
        spent = self._nfe[name]
        return max(1.0, sum(spent) / len(spent) if spent else self.expected[name])

    def _estimate(self, number: int) -> str:
        took = self._clock() - self._began
        speed = 1000 * took / (self.done - self._kept)
        whole = timedelta(seconds=round(took + self.seconds_left))
        first = counted(number, "picture")
        return f"about {whole} (h:mm:ss) for all pictures, by the first {first}: {speed:.0f} ms an evaluation"
