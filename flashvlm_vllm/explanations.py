# SPDX-License-Identifier: Apache-2.0
"""What the worker records for an API process that asked why tokens were kept.

Nothing is recorded, and nothing computed, of an item that nobody watches.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashvlm_vllm.bounded import remember

_LIMIT = 64
"""Watches at a time. One whose client went away is never taken, and goes when others come."""


@dataclass(frozen=True)
class Watch:
    """What one request wants to know: of which items, and for which question."""

    identities: frozenset[str]
    """Of the items with what is asked of them, hex."""
    query_ids: tuple[int, ...]
    """The question's tokens. Some selectors are not shown it, and their items' identities do not
    depend on it."""
    records: dict[str, Any] = field(default_factory=dict)
    """What was found out, by identity."""


class Explanations:
    """Watches by the name that a request gives its own."""

    def __init__(self) -> None:
        self._watches: dict[str, Watch] = {}

    def watch(self, name: str, identities: Iterable[str], query_ids: Sequence[int]) -> None:
        """Record these items' selections from now on."""
        remember(self._watches, name, Watch(frozenset(identities), tuple(query_ids)), _LIMIT)

    @property
    def is_watching(self) -> bool:
        """Whether anything is watched."""
        return bool(self._watches)

    def watches_of(self, identity: str) -> list[Watch]:
        """Return those that want to know about an item, in the order in which they came."""
        return [watch for watch in self._watches.values() if identity in watch.identities]

    def take(self, name: str) -> dict[str, Any]:
        """Return the records of a watch, by identity, and end it."""
        watch = self._watches.pop(name, None)
        return {} if watch is None else watch.records


EXPLANATIONS = Explanations()
"""The worker's watches: one object per process, spoken to over RPC."""
