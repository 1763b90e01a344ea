# SPDX-License-Identifier: Apache-2.0
"""Records for which items a selector or the model failed, so that their requests can fail."""

from collections.abc import Iterable

from flashvlm_vllm.lru import put_bounded

_LIMIT = 100_000
_LONGEST = 2_000
"""Most characters of a message, which comes from another package."""


class SelectorFailures:
    """Error messages by selection key; the oldest are removed first."""

    def __init__(self) -> None:
        self._messages: dict[str, str] = {}

    def add(self, selection_key: str, message: str) -> None:
        """Record why an item's selection failed.

        The item remains failed, because the tokens used in its place are in the prefix cache.
        """
        put_bounded(self._messages, selection_key, message[:_LONGEST], _LIMIT)

    def among(self, identities: Iterable[str]) -> dict[str, str]:
        """Return the messages of those items that failed."""
        return {each: self._messages[each] for each in identities if each in self._messages}


SELECTOR_FAILURES = SelectorFailures()
"""The failures in the worker process, read over RPC."""
