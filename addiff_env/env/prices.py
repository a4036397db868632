"""What an evaluation costs in each lane: named, drawn from a range, or the reward's own; and how the policy sees it.

A drawn price comes from the episode's seed alone, by a stream of its own: it depends on no other lane, and the initial
noise of the seed stays what it is without prices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import numpy as np

from addiff_env.env.validation import at_least, checked, plain, shown

PriceRange = Sequence[float]  # [lo, hi]: lowest and highest price of one evaluation, both included
OWN = -1.0  # stands for the reward's own price, which may change while an episode runs
_STREAM = 1  # of a seed's draws, the one that prices come from
_SLACK = 1e-6  # relative: a bound in single precision is the bound


def read_price_range(value: Any) -> tuple[float, float] | None:
    """The setting ``price_range``, checked; None stays None.

    Raises:
        ValueError: not two finite numbers [lo, hi] with 0 < lo <= hi; the message shows the value.
    """
    found = plain(value)
    if found is None:
        return None
    try:
        low, high = (float(checked("price", bound, float)) for bound in found)
    except (TypeError, ValueError):
        low = high = math.nan
    if isinstance(found, str) or not 0 < low <= high:
        raise ValueError(f"price_range must be [lo, hi] with 0 < lo <= hi, or None, got {shown(value)}")
    return low, high


def check_price(value: Any, price_range: PriceRange | None = None) -> float:
    """Return ``value`` as a number if it is a price of one evaluation.

    Raises:
        ValueError: not finite, negative, or outside of the range; the message shows it.
    """
    price = float(checked("price", value, Annotated[float, at_least(0)]))
    if price_range is None:
        return price
    low, high = price_range
    if not low * (1 - _SLACK) <= price <= high * (1 + _SLACK):
        raise ValueError(f"price must lie in price_range [{low:g}, {high:g}], got {shown(value)}")
    return min(max(price, low), high)


def draw_price(price_range: PriceRange, rng: np.random.Generator) -> float:
    """A log-uniform price."""
    return float(price_at(price_range, rng.uniform(-1, 1)))


def start_prices(
    seeds: Iterable[int], named: Sequence[float | None] | None, price_range: PriceRange | None
) -> np.ndarray:
    """Prices (L,) of episodes with these ``seeds``; `OWN` where none is named nor to be drawn."""
    prices = []
    for row, seed in enumerate(seeds):
        price = None if named is None else named[row]
        if price is None and price_range is not None:
            price = draw_price(price_range, np.random.default_rng([_STREAM, seed]))
        prices.append(OWN if price is None else price)
    return np.array(prices)


def check_saved(prices: np.ndarray, price_range: PriceRange | None) -> None:
    """Refuse the ``prices`` (B,) of a saved state whose environment had another range than this one.

    Raises:
        ValueError: they are not all in ``price_range``, where there is one; the message shows them.
    """
    if price_range is not None and not ((price_range[0] <= prices) & (prices <= price_range[1])).all():
        low, high = price_range
        raise ValueError(f"the state's prices are not all in price_range [{low:g}, {high:g}]: {shown(prices.tolist())}")


def charged(prices: np.ndarray, otherwise: float) -> np.ndarray:
    """``prices`` (B,) with ``otherwise``, the reward's, for `OWN`."""
    return np.where(prices == OWN, otherwise, prices)


def position(price_range: PriceRange, price: Any) -> np.ndarray:
    """Where prices stand in the range, by their logarithm: -1 at its lower end, 1 at its upper end.

    Of a range of one price the position is 0.
    """
    low, high = np.log(price_range)
    if low == high:
        return np.zeros(np.shape(price))
    return np.clip(2 * (np.log(price) - low) / (high - low) - 1, -1, 1)


def price_at(price_range: PriceRange, where: Any) -> np.ndarray:
    """The prices at positions in [-1, 1]: the reverse of `position`."""
    low, high = np.log(price_range)
    prices = np.exp(low + (np.asarray(where) + 1) / 2 * (high - low))
    return np.clip(prices, price_range[0], price_range[1])
