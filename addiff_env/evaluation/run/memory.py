"""How much memory making pictures took at most."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


def watched(groups: Iterable[T], device: torch.device) -> Iterator[tuple[T, int]]:
    """Each group with the peak memory of making it, bytes.

    On a CUDA device: the most that PyTorch had allocated there since the group before was taken, the models included.
    Elsewhere: the largest resident size that the process ever had, which never falls.
    """
    iterator = iter(groups)
    while True:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            group = next(iterator)
        except StopIteration:
            return
        yield group, peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes, as `watched` has it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
