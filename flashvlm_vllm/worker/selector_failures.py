# SPDX-License-Identifier: Apache-2.0
"""Which images a selector failed on, so that the API process can fail their requests."""

from collections.abc import Iterable

from flashvlm_vllm.lru import put_bounded

_LIMIT = 100_000
_LONGEST = 2_000
"""Characters of a message, which comes from another package."""


class SelectorFailures:
    """Messages by the identity of the image; the oldest are forgotten first."""

    def __init__(self) -> None:
        self._messages: dict[str, str] = {}

    def add(self, selection_key: str, message: str) -> None:
        """Remember why an image's selection failed.

        It stays failed: what stood in for it is in the prefix cache by now.
        """
        put_bounded(self._messages, selection_key, message[:_LONGEST], _LIMIT)

    def among(self, identities: Iterable[str]) -> dict[str, str]:
        """Return the messages of those images that failed."""
        return {each: self._messages[each] for each in identities if each in self._messages}


SELECTOR_FAILURES = SelectorFailures()
"""The worker's failures: one per process, asked for over RPC."""
