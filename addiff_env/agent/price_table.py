"""What an agent with a price input does at which price, as measured on held-out prompts; and the price of a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

import numpy as np
from scipy.optimize import isotonic_regression

from addiff_env.env.validation import above, checked

_SLACK = 1e-6  # relative: a target that was read off the table is within it


@dataclass(frozen=True)
class PricePoint:
    """Means over pictures at one price of an evaluation."""

    price: float
    nfe: float
    net_flops: float  # the policy's own included
    reward: float  # sum of an episode's rewards
    quality: float  # of the final pictures, as the reward weighs it
    success: float | None = None  # share that the embedded world's checker accepts


@dataclass(frozen=True)
class PriceTable:
    """Points by ascending price, and what they were measured on (JSON-able).

    Raises:
        ValueError: no points, or a price twice.
    """

    points: tuple[PricePoint, ...]
    measured_on: Mapping[str, Any]

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.points, key=lambda point: point.price))
        if len({point.price for point in ordered}) < max(1, len(ordered)):
            raise ValueError(f"a table of prices needs points, one a price, got {[point.price for point in ordered]}")
        object.__setattr__(self, "points", ordered)

    @classmethod
    def read(cls, kept: Any) -> PriceTable:
        """From what `kept` gave.

        Raises:
            ValueError: it is no such thing.
        """
        try:
            return cls(tuple(_read_point(row) for row in kept["points"]), dict(kept["measured_on"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the agent's table of prices is damaged: {error}") from error

    def kept(self) -> dict[str, Any]:
        """As the bundle's JSON holds it."""
        return {"measured_on": dict(self.measured_on), "points": [asdict(point) for point in self.points]}

    def limits(self, column: str) -> tuple[float, float]:
        """The least and the most of the mean ``column`` (``nfe``, ``net_flops``) that `price_for` can be asked for."""
        costs = self._falling(column)
        return float(costs[-1]), float(costs[0])

    def _falling(self, column: str) -> np.ndarray:
        """Means of ``column`` by ascending price, averaged where they would rise."""
        return isotonic_regression([getattr(point, column) for point in self.points], increasing=False).x

    def price_for(self, name: str, column: str, target: Any) -> float:
        """The price at which the mean of ``column`` is ``target``, a setting called ``name``.

        Costs fall as the price rises. Where measured ones do not, by noise, neighbours are averaged until they do
        (isotonic regression); between points the logarithm of the price is linear in the cost.

        Raises:
            ValueError: not a positive number, or one beyond what was measured; the message names the range.
        """
        wanted = float(checked(name, target, Annotated[float, above(0)]))
        logs = np.log([point.price for point in self.points])
        costs, (least, most) = self._falling(column), self.limits(column)
        if not least * (1 - _SLACK) <= wanted <= most * (1 + _SLACK):
            lowest, highest = self.points[0].price, self.points[-1].price
            measured = f"as the agent was measured at prices from {lowest:g} to {highest:g}"
            raise ValueError(f"{name} must lie in [{least:.4g}, {most:.4g}], {measured}, got {target!r}")
        levels = np.unique(costs)  # ascending; points of one level stand at their middle
        middles = [logs[costs == level].mean() for level in levels]
        return float(np.exp(np.interp(wanted, levels, middles)))


def _read_point(row: Mapping[str, Any]) -> PricePoint:
    numbers = {field.name: row[field.name] for field in fields(PricePoint) if field.name != "success"}
    optional = {"success": checked("success", row.get("success"), float | None)}
    return PricePoint(**{name: float(checked(name, value, float)) for name, value in numbers.items()}, **optional)
