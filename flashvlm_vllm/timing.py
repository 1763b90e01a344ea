# SPDX-License-Identifier: Apache-2.0
"""Times the selection in the worker without making the host wait for the device."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SelectionClock:
    """Adds up the seconds of selections; device times are read once they have finished."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._items = 0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measure(self, device: torch.device, items: int) -> Iterator[None]:
        """Time the block, which selects tokens of ``items`` images on ``device``."""
        self._items += items
        if device.type == "cuda":
            start = torch.cuda.Event(enable_timing=True)
            stop = torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            stop.record()
            self._pending.append((start, stop))
            self._drain()
        else:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """Return ``{"seconds": total, "items": count}`` since the worker started."""
        self._drain()
        return {"seconds": self._seconds, "items": self._items}

    def _drain(self) -> None:
        while self._pending and self._pending[0][1].query():
            start, stop = self._pending.popleft()
            self._seconds += start.elapsed_time(stop) / 1000.0


SELECTION_CLOCK = SelectionClock()
"""The worker's clock: one per process, read over RPC when metrics are scraped."""
