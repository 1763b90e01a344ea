# SPDX-License-Identifier: Apache-2.0
"""Which images a selector failed on, so that the API process can fail their requests."""

from collections.abc import Iterable

from flashvlm_vllm.bounded import remember

_LIMIT = 100_000
_LONGEST = 2_000
"""Characters of a message, which comes from another package."""


class SelectionFailures:
    """Messages by the identity of the image; the oldest are forgotten first."""

    def __init__(self) -> None:
        self._messages: dict[str, str] = {}

    def note(self, identity: str, message: str) -> None:
        """Remember why an image's selection failed.

        It stays failed: what stood in for it is in the prefix cache by now.
        """
        remember(self._messages, identity, message[:_LONGEST], _LIMIT)

    def among(self, identities: Iterable[str]) -> dict[str, str]:
        """Return the messages of those images that failed."""
        return {each: self._messages[each] for each in identities if each in self._messages}


SELECTION_FAILURES = SelectionFailures()
"""The worker's failures: one per process, asked for over RPC."""
