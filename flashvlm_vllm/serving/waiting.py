# SPDX-License-Identifier: Apache-2.0
"""Number of requests that wait in the engines, as their schedulers last reported it."""

import time
from collections.abc import Callable
from typing import Final

_VALID_SECONDS: Final = 10.0
"""With several API processes each gets only some of the reports; an old one no longer counts."""


class Waiting:
    """Requests that wait, by engine."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """Start without reports. ``now`` is the clock, in seconds."""
        self._now = now
        self._reports: dict[int, tuple[float, int]] = {}

    def report(self, engine: int, count: int) -> None:
        """Record the number of requests that wait in one engine."""
        self._reports[engine] = (self._now(), count)

    def count(self) -> int:
        """Return the number of requests that wait in all engines."""
        oldest = self._now() - _VALID_SECONDS
        return sum(count for reported, count in self._reports.values() if reported >= oldest)


WAITING: Final = Waiting()
"""Of this API process."""
