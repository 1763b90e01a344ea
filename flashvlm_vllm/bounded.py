# SPDX-License-Identifier: Apache-2.0
"""Memories that do not grow for ever."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)
Value = TypeVar("Value")


def remember(memory: dict[Name, Value], key: Name, value: Value, limit: int) -> None:
    """Put an entry into ``memory``; the oldest goes when there are more than ``limit``."""
    memory[key] = value
    if len(memory) > limit:
        memory.pop(next(iter(memory)))


class RecentlyUsed(Generic[Value]):
    """Values by key within a number of bytes; the least recently used go first.

    What stays depends on the order of the calls and on the sizes alone, so ranks that are asked
    for the same things in the same order hold the same things.
    """

    def __init__(self, limit_bytes: int, size_of: Callable[[Value], int]) -> None:
        """``size_of`` tells how many bytes a value holds; it must always answer alike."""
        self.limit_bytes = limit_bytes
        self._size_of = size_of
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self.held_bytes = 0

    def get(self, key: Hashable) -> Value | None:
        """Return a value, ``None`` if it is not known (any more)."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: Hashable, value: Value) -> None:
        """Remember a value, unless it is larger than the limit."""
        self._forget(key)
        size = self._size_of(value)
        if size > self.limit_bytes:
            return
        self._values[key] = value
        self.held_bytes += size
        while self.held_bytes > self.limit_bytes:
            self._forget(next(iter(self._values)))

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()
        self.held_bytes = 0

    def _forget(self, key: Hashable) -> None:
        value = self._values.pop(key, None)
        if value is not None:
            self.held_bytes -= self._size_of(value)
