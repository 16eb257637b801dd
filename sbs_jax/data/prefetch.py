"""Prefetching of batches by a thread, while the current batch is in use."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

_Item = TypeVar("_Item")


class Prefetcher(Iterator[_Item]):
    """Iterator whose items a thread computes ahead; use it with `with`.

    An error of the iterator is raised instead of its item.
    """

    def __init__(self, items: Iterator[_Item], *, depth: int = 2) -> None:
        self._items = items
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="batches ahead")

    def _work(self) -> None:
        try:
            for item in self._items:
                self._hand_over((item, None))
                if self._stop.is_set():
                    return
            self._hand_over((None, StopIteration()))
        except BaseException as error:
            self._hand_over((None, error))

    def _hand_over(self, outcome: tuple[Any, BaseException | None]) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(outcome, timeout=0.1)
                return

    def __next__(self) -> _Item:
        item, error = self._ready.get()
        if error is not None:
            self._ready.put((None, error))
            raise error
        return item

    def __enter__(self) -> Prefetcher[_Item]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
