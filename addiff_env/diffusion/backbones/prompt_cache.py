"""Encoded texts, kept while there is room for them: the latest on the device, others on the host."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch

DEVICE_BYTES = 256 * 2**20  # an accelerator's memory is scarce: of Flux's encodings (2 MiB) 128, of SD 1.5's 2,200
HOST_BYTES = 2 * 2**30


class _Encoding(Protocol):
    @property
    def nbytes(self) -> int: ...

    def to(self, device: torch.device) -> _Encoding: ...


T = TypeVar("T", bound=_Encoding)


class PromptCache(Generic[T]):
    """Encodings by their text, least recently used first out.

    Args:
        device: where they are made and wanted.
        device_bytes: those used last stay there, up to so many bytes (one always does).
        host_bytes: the others wait on the host, up to so many bytes; what is beyond is dropped and encoded again. On
            the CPU there is one memory, and this is its bound.
    """

    def __init__(
        self, device: torch.device, device_bytes: float = DEVICE_BYTES, host_bytes: float = HOST_BYTES
    ) -> None:
        self.device = device
        on_host = device.type == "cpu"
        self._near: _Tier[T] = _Tier(host_bytes if on_host else device_bytes)
        self._far: _Tier[T] = _Tier(0 if on_host else host_bytes)

    def get(self, text: str, encode: Callable[[str], T]) -> T:
        """The encoding of ``text`` on the device, by ``encode`` where it is not known."""
        found = self._near.take(text)
        if found is None:
            waiting = self._far.take(text)
            found = encode(text) if waiting is None else waiting.to(self.device)  # type: ignore[assignment]
        assert found is not None
        for other, encoding in self._near.put(text, found):
            if self._far.limit:
                self._far.put(other, encoding.to(torch.device("cpu")))  # type: ignore[arg-type]
        return found

    def __len__(self) -> int:
        return len(self._near.kept) + len(self._far.kept)

    @property
    def device_bytes(self) -> int:
        """Bytes held on the device."""
        return self._near.bytes


class _Tier(Generic[T]):
    """Encodings in one memory, up to ``limit`` bytes."""

    def __init__(self, limit: float) -> None:
        self.limit, self.bytes = limit, 0
        self.kept: OrderedDict[str, T] = OrderedDict()

    def take(self, text: str) -> T | None:
        found = self.kept.pop(text, None)
        self.bytes -= 0 if found is None else found.nbytes
        return found

    def put(self, text: str, encoding: T) -> list[tuple[str, T]]:
        """Keep ``encoding`` as the one used last; returns those that have to leave for it."""
        self.kept[text] = encoding
        self.bytes += encoding.nbytes
        left = []
        while self.bytes > self.limit and len(self.kept) > 1:
            oldest, dropped = self.kept.popitem(last=False)
            self.bytes -= dropped.nbytes
            left.append((oldest, dropped))
        return left
