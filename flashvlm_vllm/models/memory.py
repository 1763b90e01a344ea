# SPDX-License-Identifier: Apache-2.0
"""The worker's memory of what it chose, bounded in bytes."""

from collections import OrderedDict
from collections.abc import Hashable

from flashvlm_vllm.selection import Selection

_LIMIT_BYTES = 64 * 2**20
_OVERHEAD_BYTES = 512
"""What an entry costs beside its tensor, about. 64 indices are as much again, 64 merged tokens of
a 7B model's tower 128 KiB: thousands of choices fit, or hundreds of merges."""


class SelectionMemory:
    """Selections by what they are for; the least recently used go first."""

    def __init__(self, limit_bytes: int = _LIMIT_BYTES) -> None:
        self._limit = limit_bytes
        self._held = 0
        self._selections: OrderedDict[Hashable, Selection] = OrderedDict()

    def get(self, key: Hashable) -> Selection | None:
        """Return what was chosen before, ``None`` if that is not known (any more)."""
        selection = self._selections.get(key)
        if selection is not None:
            self._selections.move_to_end(key)
        return selection

    def put(self, key: Hashable, selection: Selection) -> None:
        """Remember a choice; the latest is never the one that has to go."""
        self._forget(key)
        self._selections[key] = selection
        self._held += _bytes(selection)
        while self._held > self._limit and len(self._selections) > 1:
            self._forget(next(iter(self._selections)))

    def _forget(self, key: Hashable) -> None:
        selection = self._selections.pop(key, None)
        if selection is not None:
            self._held -= _bytes(selection)


def _bytes(selection: Selection) -> int:
    held = [each.nbytes for each in (selection.indices, selection.merged) if each is not None]
    return sum(held) + _OVERHEAD_BYTES
