"""Quality bars: a measured number, and what is required of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from addiff_env.stats import wilson_interval


@dataclass(frozen=True)
class Bar:
    """One measured number and what is required of it; a bar without ``least`` and ``most`` only informs.

    Shares (``unit`` %) are held as fractions, with the ``n`` cases they were counted over.
    """

    name: str
    measured: float
    least: float | None = None
    most: float | None = None
    unit: str = "%"
    n: int | None = None
    interval: tuple[float, float] | None = None
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the requirement is met; None when there is none. A measurement that is NaN fails."""
        if self.least is None and self.most is None:
            return None
        above = self.least is None or self.measured >= self.least
        return above and (self.most is None or self.measured <= self.most)

    @property
    def required(self) -> str:
        """The requirement in words."""
        if self.least is not None and self.most is not None:
            return f"{self.show(self.least)} to {self.show(self.most)}"
        if self.least is not None:
            return f">= {self.show(self.least)}"
        return "-" if self.most is None else f"<= {self.show(self.most)}"

    def entry(self) -> dict[str, Any]:
        """The bar as JSON has it: NaN becomes None."""
        measured = None if math.isnan(self.measured) else self.measured
        return {**asdict(self), "measured": measured, "required": self.required, "passed": self.passed}

    def show(self, value: float) -> str:
        """A value with the bar's unit."""
        return f"{100 * value:.1f}%" if self.unit == "%" else f"{value:.4g} {self.unit}"


def share(name: str, outcomes: Sequence[bool], least: float | None = None, **extra: Any) -> Bar:
    """The bar of a share of ``outcomes`` that are true; NaN, so failing, when there are none."""
    hits, n = sum(outcomes), len(outcomes)
    return Bar(name, hits / n if n else math.nan, least, n=n, interval=wilson_interval(hits, n) if n else None, **extra)


def worst_share(name: str, by_category: dict[str, list[bool]], least: float) -> Bar:
    """The bar of "at least ``least`` in every category": the share of the worst one, which the note names."""
    worst = min(by_category, key=lambda c: sum(by_category[c]) / len(by_category[c]))
    return share(f"{name}, worst category", by_category[worst], least, note=worst)


def table(bars: Sequence[Bar]) -> str:
    """All bars as text, one a line."""
    rows = [("bar", "required", "measured", "95% interval", "n", "", "")]
    for bar in bars:
        interval = "" if bar.interval is None else " to ".join(bar.show(end) for end in bar.interval)
        verdict = {True: "pass", False: "FAIL", None: "-"}[bar.passed]
        number = "" if bar.n is None else str(bar.n)
        rows.append((bar.name, bar.required, bar.show(bar.measured), interval, number, verdict, bar.note))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
