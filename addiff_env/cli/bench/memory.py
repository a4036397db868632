"""How much memory something takes at most, beyond what was in use before it."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # of `_CLEAR`, see proc(5)


def peak_of(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that ``run`` takes at most beyond those in use before it; None where the system does not say.

    On a CUDA device what PyTorch has allocated; elsewhere resident memory of the process. What a run before has freed
    is first given back to the system, which would otherwise not notice that it is used again.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if not _reset_peak():
        return None
    before = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - before)


def _reset_peak() -> bool:
    """Give freed memory back, and let the peak begin at what is left; False where the system has no such thing."""
    with suppress(OSError, AttributeError):  # another C library than glibc keeps what it likes
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text(_RESET_PEAK)
        return "VmHWM" in _STATUS.read_text()
    except OSError:
        return False


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found, f"{_STATUS} has no {name}"
    return 1024 * int(found[1])
