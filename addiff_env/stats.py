"""Numbers that several layers need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Z95 = 1.959964  # standard normal quantile of a two-sided 95% interval


def wilson_interval(successes: float, number: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), 95% by default.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if number < 1 or not 0 <= successes <= number:
        raise ValueError(f"no share of {successes} in {number}")
    share, spread = successes / number, z * z / number
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / number + spread / (4 * number)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def spread(items: Sequence[Any], number: int) -> list[Any]:
    """``number`` of ``items`` (or all, if fewer), evenly spaced."""
    at = np.linspace(0, len(items) - 1, min(number, len(items))).round().astype(int)
    return [items[index] for index in at]
