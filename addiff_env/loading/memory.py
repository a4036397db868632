"""How much memory a decoder's activations take, and how many pictures fit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GIB = 2**30
CPU_CEILING = 4 * GIB  # of one decode's activations, unless a setting says otherwise
_FREE_SHARE = 0.5  # of a GPU's free memory: convolutions want room to work in besides
_FULL_SIZE_TENSORS = 3  # a residual block's input, its norm and its activation live at once


def bytes_per_pixel(vae: Any) -> int:
    """Peak of the activations of a decode, bytes per pixel of the picture.

    It is reached where the picture has its full size first: the last upsampling hands on the channels of the block
    before.
    """
    config = vae.config
    widths = list(config.get("block_out_channels") or config.get("decoder_block_out_channels") or [256])
    return _FULL_SIZE_TENSORS * max(widths[:2]) * vae.dtype.itemsize


def free_memory(device: torch.device) -> int:
    """Bytes that may be allocated on a CUDA device now: what is free, and what PyTorch keeps for later."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def activation_ceiling(device: torch.device, gib: float | None) -> float:
    """Bytes that a decode's activations may take: ``gib`` GiB; None: half of what is free on CUDA, elsewhere 4 GiB."""
    if gib is not None:
        return gib * GIB
    return _FREE_SHARE * free_memory(device) if device.type == "cuda" else CPU_CEILING


def in_slices(call: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, number: int) -> torch.Tensor:
    """``call`` of all ``rows`` (B, ...), at most ``number`` at a time.

    On the CPU at least two at a time, so that the result is what one call gives to the last digit: PyTorch adds up
    otherwise where there is one row.
    """
    on_cpu = rows.device.type == "cpu"
    number = max(number, 2) if on_cpu else number
    if len(rows) <= number:
        return call(rows)
    with _KernelsOfBatch(len(rows)) if on_cpu else nullcontext():
        if on_cpu and len(rows) % number == 1:  # the last goes with the one before it, which is computed twice
            return torch.cat([*map(call, rows[:-1].split(number)), call(rows[-2:])[1:]])
        return torch.cat([call(part) for part in rows.split(number)])


class _KernelsOfBatch(TorchDispatchMode):
    """While it lasts, the CPU's convolutions are by the kernel that PyTorch takes for a batch of ``rows``.

    It has two, and takes one or the other by the number of rows: their last digits differ.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and not kwargs:
            image, weight, bias, stride, padding, dilation, transposed, more, groups = args
            whole = image[:1].expand(self.rows, *image.shape[1:])
            rest = (weight, bias, stride, padding, dilation, transposed, more, groups, None)
            if torch._C._select_conv_backend(whole, *rest) == torch._C._ConvBackend.Mkldnn:
                return torch.ops.aten.mkldnn_convolution(image, weight, bias, padding, stride, dilation, groups)
        return func(*args, **(kwargs or {}))
