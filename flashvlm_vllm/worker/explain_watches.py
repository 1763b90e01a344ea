# SPDX-License-Identifier: Apache-2.0
"""Explained requests, whose selections the worker records.

For items of other requests nothing is recorded or computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flashvlm_vllm.ipc.explain_request import ItemRecord
from flashvlm_vllm.lru import put_bounded

_LIMIT = 64
"""Most requests at a time. The records of a request whose client disconnected are never taken;
newer requests replace them."""


@dataclass(frozen=True)
class ExplainWatch:
    """An explained request: its items, and the words to score them with."""

    questions: Mapping[str, tuple[int, ...]]
    """Token ids of the words, by selection key in hexadecimal. For a selector that does not use the
    question, the selection keys do not depend on it."""
    records: dict[str, ItemRecord] = field(default_factory=dict)
    """Records by selection key."""


class ExplainWatches:
    """Explained requests by their explain id."""

    def __init__(self) -> None:
        self._watches: dict[str, ExplainWatch] = {}

    def add(self, explain_id: str, questions: Mapping[str, Sequence[int]]) -> None:
        """Start recording the selections of these items; see `ExplainWatch.questions`."""
        watch = ExplainWatch({key: tuple(ids) for key, ids in questions.items()})
        put_bounded(self._watches, explain_id, watch, _LIMIT)

    @property
    def is_watching(self) -> bool:
        """Whether selections are recorded for any request."""
        return bool(self._watches)

    def of_item(self, selection_key: str) -> list[ExplainWatch]:
        """Return the requests that contain an item, in the order in which they were added."""
        return [each for each in self._watches.values() if selection_key in each.questions]

    def take(self, explain_id: str) -> dict[str, ItemRecord]:
        """Stop recording for a request and return its records, by selection key."""
        watch = self._watches.pop(explain_id, None)
        return {} if watch is None else watch.records


EXPLAIN_WATCHES = ExplainWatches()
"""One object per worker process, called over RPC."""
