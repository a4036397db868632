"""What a GPU would be waited for, and what a step calls, found on a CPU."""

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Lists the operations that a GPU would have to finish everything before.

    In ``asked``: single numbers, masks as indices, and what was made on the host and is sent without ``non_blocking``;
    in ``sizes``, of how many numbers each, what is fetched in one piece.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.sizes: list[int] = []
        for name in ("cpu", "tolist"):
            monkeypatch.setattr(torch.Tensor, name, self._spied(getattr(torch.Tensor, name)))
        for name in ("tensor", "as_tensor", "from_numpy"):
            monkeypatch.setattr(torch, name, self._marked(getattr(torch, name)))
        monkeypatch.setattr(torch.Tensor, "to", self._sent(torch.Tensor.to))

    def _spied(self, original: Any) -> Any:
        def spy(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sizes.append(tensor.numel())
            return original(tensor, *args, **kwargs)

        return spy

    def _marked(self, original: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("device") is not None:
                self.asked.append("made on the host, for the device")
            made = original(*args, **kwargs)
            made.made_on_host = True
            return made

        return make

    def _sent(self, original: Any) -> Any:
        def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            devices = [value for value in (*args, kwargs.get("device")) if isinstance(value, (torch.device, str))]
            if devices and getattr(tensor, "made_on_host", False) and not kwargs.get("non_blocking"):
                self.asked.append("sent to the device, which is waited for")
            return original(tensor, *args, **kwargs)

        return to

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [index for group in args if isinstance(group, (list, tuple)) for index in group]
        by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in masks)
        if any(word in str(func) for word in ("_local_scalar", "nonzero", "masked_select", "aten.equal")) or (
            "aten.index" in str(func) and by_mask
        ):
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


class Calls(TorchDispatchMode):
    """Counts by name the package's ``functions`` that are called, and torch's ``operations``."""

    def __init__(self) -> None:
        super().__init__()
        self.functions, self.operations = Counter[str](), Counter[str]()

    def __enter__(self) -> "Calls":
        super().__enter__()
        sys.setprofile(self._count)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.setprofile(None)
        super().__exit__(*error)

    def _count(self, frame: Any, event: str, argument: Any) -> None:
        if event == "call" and "addiff_env" in frame.f_code.co_filename:
            self.functions[f"{frame.f_code.co_filename}:{frame.f_code.co_name}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[str(func)] += 1
        return func(*args, **(kwargs or {}))
