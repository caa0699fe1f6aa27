"""Makes the next training batch while the network learns from the current one, `Ahead`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from pqk.families.contract import Batches


class Ahead:
    """The same batches (a `Batches`), each made in a thread as soon as the one before it has been fetched.

    Rendering and reading use one core while the network's small operations leave another idle. The batches that are
    wrapped are asked by one thread at a time. stride: from the number of one training batch to that of the next.
    """

    def __init__(self, batches: Batches, stride: int = 1) -> None:
        self.truthful = batches.truthful
        self._batches, self._stride = batches, stride
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[tuple[int, int, int], Future[Any]] | None = None

    def train(self, index: int, count: int, size: int) -> Any:
        asked, following = (index, count, size), (index + self._stride, count, size)
        self._finish()
        made = (
            self._next[1] if self._next and self._next[0] == asked else self._thread.submit(self._batches.train, *asked)
        )
        batch = made.result()
        self._next = following, self._thread.submit(self._batches.train, *following)
        return batch

    def held_out(self, pairs: int | None = None, size: int | None = None, batch: int | None = None) -> Iterator[Any]:
        self._finish()
        return self._batches.held_out(pairs, size, batch)

    def _finish(self) -> None:
        if self._next is not None:
            wait([self._next[1]])
