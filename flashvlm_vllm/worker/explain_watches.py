# SPDX-License-Identifier: Apache-2.0
"""Requests whose selections the worker records because an API process will explain them.

Nothing is recorded, and nothing computed, of other requests' items.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from flashvlm_vllm.ipc.explain_request import ItemRecord
from flashvlm_vllm.lru import put_bounded

_LIMIT = 64
"""Requests at a time. One whose client disconnected is never taken; newer ones push it out."""


@dataclass(frozen=True)
class ExplainWatch:
    """One request: its items, and the question to score them with."""

    selection_keys: frozenset[str]
    """Hex."""
    question_ids: tuple[int, ...]
    """Token ids. Some selectors do not use the question, and the selection keys of their items do
    not depend on it."""
    records: dict[str, ItemRecord] = field(default_factory=dict)
    """By selection key."""


class ExplainWatches:
    """Requests by their explain id."""

    def __init__(self) -> None:
        self._watches: dict[str, ExplainWatch] = {}

    def add(
        self, explain_id: str, selection_keys: Iterable[str], question_ids: Sequence[int]
    ) -> None:
        """Record these items' selections from now on."""
        watch = ExplainWatch(frozenset(selection_keys), tuple(question_ids))
        put_bounded(self._watches, explain_id, watch, _LIMIT)

    @property
    def is_watching(self) -> bool:
        """Whether any request is recorded."""
        return bool(self._watches)

    def of_item(self, selection_key: str) -> list[ExplainWatch]:
        """Return the requests that have an item, in the order in which they were added."""
        return [each for each in self._watches.values() if selection_key in each.selection_keys]

    def take(self, explain_id: str) -> dict[str, ItemRecord]:
        """Remove a request and return its records, by selection key."""
        watch = self._watches.pop(explain_id, None)
        return {} if watch is None else watch.records


EXPLAIN_WATCHES = ExplainWatches()
"""One object per worker process, called over RPC."""
