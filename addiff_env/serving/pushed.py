"""Work in a thread of its own, as an iterator that may be left at any time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()


class Abandoned(Exception):
    """Nobody waits any more for what is being made."""


def pushed(work: Callable[[Callable[[T], None]], None], closing: Event | None = None) -> Iterator[T]:
    """What ``work`` hands to its argument, while it runs in a thread of its own.

    A web server takes each item of an iterator in whichever thread is free; work that holds a lock stays in one. Where
    the iterator is closed, or ``closing`` is set, the argument raises `Abandoned` inside of ``work`` at its next item.
    Errors of ``work`` are raised here.
    """
    items: SimpleQueue[Any] = SimpleQueue()
    left = Event()

    def hand_over(item: T) -> None:
        if left.is_set() or (closing is not None and closing.is_set()):
            raise Abandoned
        items.put((item, None))

    def run() -> None:
        try:
            work(hand_over)
        except Abandoned:
            pass
        except BaseException as error:
            items.put((None, error))
        finally:
            items.put(_END)

    Thread(target=run, name="addiff-lane", daemon=True).start()
    try:
        while (found := items.get()) is not _END:
            item, error = found
            if error is not None:
                raise error
            yield item
    finally:
        left.set()
