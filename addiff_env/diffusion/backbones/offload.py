"""Networks that wait on the host, so that a model larger than the accelerator's memory runs (slower)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module

OFFLOADS = ("none", "model", "sequential")


def check_offload(offload: str, device: str, compile: bool) -> None:
    """Refuse what cannot be carried out.

    Raises:
        ValueError: an unknown way, a device without a memory of its own, or a layer-by-layer way of compiled layers.
    """
    if offload not in OFFLOADS:
        raise ValueError(f"unknown offload {offload!r}; known: {', '.join(OFFLOADS)}")
    if offload != "none" and torch.device(device).type == "cpu":
        raise ValueError(f"offload {offload!r} needs an accelerator to offload from, the device is {device!r}")
    if offload == "sequential" and compile:
        raise ValueError("offload 'sequential' moves weights between layers, which compile=True does not follow")


def attach_offload(modules: Sequence[Any], device: torch.device, offload: str) -> None:
    """Let ``modules``, which lie on the host, come to ``device`` when they are called (or ``decode``, or ``encode``).

    ``model``: one whole network at a time, which stays until another is called. ``sequential``: layer by layer, each
    for as long as it computes: least memory, slowest (as diffusers' ``enable_sequential_cpu_offload``).
    """
    if offload == "sequential":
        for module in modules:
            cpu_offload(module, device, offload_buffers=len(module._parameters) > 0)
    elif offload == "model":
        resident = _Resident(device)
        for module in modules:
            add_hook_to_module(module, _ComesWhenCalled(resident))


class _Resident:
    """Which network lies on the device.

    diffusers' own pipelines chain their networks, as they call them in a fixed order, and clean up after a picture.
    Here text encoders, denoiser and decoder are called in any order, so that a network which is
    called sends away the one before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.module = device, None

    def load(self, module: Any) -> None:
        if self.module is module:
            return
        if self.module is not None:
            self.module.to("cpu")
        self.module = module.to(self.device)


class _ComesWhenCalled(ModelHook):
    def __init__(self, resident: _Resident) -> None:
        self.resident = resident
        self.execution_device = resident.device  # diffusers' pipelines look for it to know where they run

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.resident.load(module)
        return args, kwargs


def load_now(module: Any) -> None:
    """Bring a network to the device that would come when it is called, so that what is free beside it can be told."""
    hook = getattr(module, "_hf_hook", None)
    if isinstance(hook, _ComesWhenCalled):
        hook.pre_forward(module)
