"""Makes the items of a sequence when they are requested: `Kept`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

from pqk.lru import Lru

T = TypeVar("T")


class Kept(Sequence[T]):
    """A sequence whose items are made when they are requested; those used last are kept, up to a number of bytes.

    So a scene of a thousand pictures needs no more memory than one of sixty. make: the item of an index; size: its
    bytes. At least two items are kept, as a pair needs.
    """

    def __init__(self, count: int, make: Callable[[int], T], size: Callable[[T], int], limit: int) -> None:
        self._count, self._make = count, make
        self._items: Lru[int, T] = Lru(size, limit)

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
        return self._items.get(index, lambda: self._make(index))
