# SPDX-License-Identifier: Apache-2.0
"""Measures the time of selections in the worker without synchronizing with the device."""

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final, NamedTuple

import torch
from vllm.logger import init_logger

from flashvlm_vllm.ipc.worker_calls import SelectionTotals

logger = init_logger("vllm.flashvlm")  # vLLM configures only its own loggers

SLOW: Final = "FLASHVLM_SLOW_SELECTION_SECONDS"
"""Environment variable: a selection that takes longer, in seconds, is logged as a warning."""
DEFAULT_SLOW: Final = 1.0


class Work(NamedTuple):
    """One call of a selector, or of the language model for it."""

    selector: str
    items: int
    """Number of images or videos."""
    tokens: int
    """Visual tokens of the largest of them."""
    is_counted: bool = True
    """False for a call whose items another call counts."""


class SelectionClock:
    """Adds up the times of selections. Device times are read once they are available."""

    def __init__(self) -> None:
        self._totals: dict[str, SelectionTotals] = {}
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, Work]] = deque()

    @contextmanager
    def measure(self, device: torch.device, work: Work) -> Iterator[None]:
        """Measure the time of the block, which selects on ``device``."""
        if device.type == "cuda":
            start = torch.cuda.Event(enable_timing=True)
            stop = torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            stop.record()
            self._pending.append((start, stop, work))
            self._drain()
        else:
            begin = time.perf_counter()
            yield
            self._add(work, time.perf_counter() - begin)

    def read(self) -> dict[str, SelectionTotals]:
        """Return the totals by selector since the worker started."""
        self._drain()
        return {name: replace(total) for name, total in self._totals.items()}

    def _drain(self) -> None:
        while self._pending and self._pending[0][1].query():
            start, stop, work = self._pending.popleft()
            self._add(work, start.elapsed_time(stop) / 1000.0)

    def _add(self, work: Work, seconds: float) -> None:
        total = self._totals.setdefault(work.selector, SelectionTotals())
        total.seconds += seconds
        total.items += work.items if work.is_counted else 0
        if seconds > slow_seconds():
            logger.warning(
                "flashvlm: selector %s took %.1f s for %d item(s) of up to %d visual tokens; all "
                "requests of the step waited for it. The threshold %s is %g",
                work.selector,
                seconds,
                work.items,
                work.tokens,
                SLOW,
                slow_seconds(),
            )


def slow_seconds() -> float:
    """Return the threshold in seconds for logging a warning.

    A value that is not a number means the default: a worker must not fail because of it.
    """
    try:
        return float(os.environ.get(SLOW, DEFAULT_SLOW))
    except ValueError:
        return DEFAULT_SLOW


SELECTION_CLOCK = SelectionClock()
"""The clock of the worker process, read over RPC when metrics are scraped."""
