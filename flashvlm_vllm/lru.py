# SPDX-License-Identifier: Apache-2.0
"""Bounded containers (LRU)."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)
Value = TypeVar("Value")


def put_bounded(entries: dict[Name, Value], key: Name, value: Value, limit: int) -> None:
    """Put an entry into a dictionary; remove the oldest if there are more than ``limit``."""
    entries[key] = value
    if len(entries) > limit:
        entries.pop(next(iter(entries)))


class RecentlyUsed(Generic[Value]):
    """Values by key, limited in bytes; the least recently used values are removed first.

    Which values are stored depends only on the order of the calls and on the sizes, so ranks that
    make the same calls in the same order store the same values.
    """

    def __init__(self, limit_bytes: int, size_of: Callable[[Value], int]) -> None:
        """Create an empty container.

        Args:
            limit_bytes: most bytes to store.
            size_of: returns the size of a value in bytes, always the same for the same value.

        """
        self.limit_bytes = limit_bytes
        self._size_of = size_of
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self.held_bytes = 0

    def get(self, key: Hashable) -> Value | None:
        """Return a value; ``None`` if it is not stored."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: Hashable, value: Value) -> None:
        """Store a value, unless it is larger than the limit."""
        self._remove(key)
        size = self._size_of(value)
        if size > self.limit_bytes:
            return
        self._values[key] = value
        self.held_bytes += size
        while self.held_bytes > self.limit_bytes:
            self._remove(next(iter(self._values)))

    def clear(self) -> None:
        """Remove all values."""
        self._values.clear()
        self.held_bytes = 0

    def _remove(self, key: Hashable) -> None:
        value = self._values.pop(key, None)
        if value is not None:
            self.held_bytes -= self._size_of(value)
