"""Work in a thread of its own that may be left at any time."""

import threading
from collections.abc import Callable

import pytest

from addiff_env.serving.pushed import pushed

Emit = Callable[[int], None]


def test_items_come_in_their_order_and_errors_after_them() -> None:
    def work(emit: Emit) -> None:
        for number in range(100):
            emit(number)
        raise ValueError("no more")

    items = pushed(work)
    assert [next(items) for _ in range(100)] == list(range(100))
    with pytest.raises(ValueError, match="no more"):
        next(items)


def test_whoever_leaves_ends_the_work_and_frees_what_it_held() -> None:
    lock, go = threading.Lock(), threading.Semaphore(1)

    def work(emit: Emit) -> None:
        with lock:
            while True:
                go.acquire()
                emit(0)

    items = pushed(work)
    assert next(items) == 0 and lock.locked()
    items.close()  # type: ignore[attr-defined]
    go.release()  # the step that runs is carried out
    assert lock.acquire(timeout=10)


def test_closing_ends_the_work_and_the_iterator() -> None:
    closing, ended = threading.Event(), threading.Event()

    def work(emit: Emit) -> None:
        try:
            emit(0)
            closing.wait()
            emit(1)
        finally:
            ended.set()

    items = pushed(work, closing)
    assert next(items) == 0
    closing.set()
    assert list(items) == [] and ended.wait(10)


def test_items_may_be_taken_in_any_thread() -> None:
    items, taken = pushed(lambda emit: [emit(number) for number in range(5)] and None), list[int]()
    for _ in range(5):
        thread = threading.Thread(target=lambda: taken.append(next(items)))
        thread.start()
        thread.join()
    assert taken == list(range(5)) and list(items) == []
