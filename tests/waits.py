"""What a GPU would be waited for, found on a CPU."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Lists the operations that a GPU would have to finish everything before: numbers asked for, masks as indices."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.sizes: list[int] = []
        for name in ("cpu", "tolist"):
            monkeypatch.setattr(torch.Tensor, name, self._spied(getattr(torch.Tensor, name)))

    def _spied(self, original: Any) -> Any:
        def spy(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sizes.append(tensor.numel())
            return original(tensor, *args, **kwargs)

        return spy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [index for group in args if isinstance(group, (list, tuple)) for index in group]
        by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in masks)
        if any(word in str(func) for word in ("_local_scalar", "nonzero", "masked_select", "aten.equal")) or (
            "aten.index" in str(func) and by_mask
        ):
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))
