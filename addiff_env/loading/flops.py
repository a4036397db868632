"""FLOPs of a call, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from addiff_env.loading.isolation import exclusive


def count_flops(call: Callable[[], Any], device: torch.device | str) -> float:
    """FLOPs of one call on ``device``, by `torch.utils.flop_counter` (matrix products, convolutions, attention)."""
    # The counter knows CUDA's fused attention, but not the CPU's: there attention is written out while it counts.
    written_out = sdpa_kernel(SDPBackend.MATH) if torch.device(device).type == "cpu" else nullcontext()
    # Which kernels attention uses is a setting of the process, and the counter watches all of its modules.
    with exclusive(), _plain_multihead_attention(), written_out, FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


@contextmanager
def _plain_multihead_attention() -> Iterator[None]:
    """Keep `nn.MultiheadAttention` (open_clip's towers) from its fused inference path, which counts as no FLOPs."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
