"""Keeps the items of a sequence that were used last, up to a number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

T = TypeVar("T")


class Kept(Sequence[T]):
    """A sequence whose items are made when they are asked for; those used last are kept, up to a number of bytes.

    A scene of a thousand pictures thus needs no more memory than one of sixty. make: the item of an index; size: its
    bytes. At least two items are kept, as a pair needs.
    """

    def __init__(self, count: int, make: Callable[[int], T], size: Callable[[T], int], limit: int) -> None:
        self._count, self._make, self._size, self._limit = count, make, size, limit
        self._items: dict[int, T] = {}  # the one used last comes last
        self._held = 0  # bytes

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(self._count))]
        index = range(self._count)[index]
        if index in self._items:
            item = self._items.pop(index)
        else:
            item = self._make(index)
            self._held += self._size(item)
        self._items[index] = item
        while self._held > self._limit and len(self._items) > 2:
            self._held -= self._size(self._items.pop(next(iter(self._items))))
        return item
