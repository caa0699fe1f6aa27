"""Keeps the values that were used last, up to a number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lru(Generic[K, V]):
    """Holds the values used last, up to `limit` bytes as `size` counts them; at least two, as a pair needs."""

    def __init__(self, size: Callable[[V], int], limit: int) -> None:
        self._size, self._limit = size, limit
        self._values: dict[K, V] = {}  # the one used last comes last
        self._held = 0  # bytes

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key; made when it is not held."""
        if key in self._values:
            value = self._values.pop(key)
        else:
            value = make()
            self._held += self._size(value)
        self._values[key] = value
        while self._held > self._limit and len(self._values) > 2:
            self._held -= self._size(self._values.pop(next(iter(self._values))))
        return value

    def clear(self) -> None:
        """Drops every value."""
        self._values.clear()
        self._held = 0
