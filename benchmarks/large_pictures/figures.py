# SPDX-License-Identifier: Apache-2.0
"""Targets and tables of the requests with a large image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.measuring.pairs import Compared, is_within
from benchmarks.measuring.report import Mark, marks_table, table
from flashvlm_vllm.selection.registry import BUILT_IN

MOST_TIMES: Final = {"two layers": 1.3, "32 layers": 1.0}
"""The longest time of a request, relative to stock vLLM."""
MOST_MEMORY: Final = 512
"""MiB that a process may need beyond stock's."""
MOST_WAIT: Final = 1.2
"""The longest time of another client's request, relative to stock vLLM."""


@dataclass(frozen=True)
class Request:
    """One request with a large image."""

    seconds: float
    """Until its one output token."""
    others: float
    """Seconds of the slowest request of the other clients during that time."""
    peak: float
    """Peak memory of the server's largest process during that time, in MiB."""


@dataclass(frozen=True)
class Pair:
    """A request to the server with the plugin, and one to stock vLLM before or after it."""

    tower: str
    name: str
    """The selector, or ``no budget``."""
    ours: Request
    stock: Request

    @property
    def times(self) -> float:
        """Time of the request, relative to stock vLLM."""
        return self.ours.seconds / self.stock.seconds

    @property
    def waits(self) -> float:
        """Longest time of another client's request, relative to stock vLLM."""
        return self.ours.others / self.stock.others

    @property
    def more(self) -> float:
        """MiB beyond stock's."""
        return self.ours.peak - self.stock.peak


def report(pairs: Sequence[Pair]) -> str:
    """Return targets and tables as Markdown."""
    towers = dict.fromkeys(pair.tower for pair in pairs)
    return "\n\n".join([marks_table(marks(pairs)), *(pairs_table(pairs, each) for each in towers)])


def marks(pairs: Sequence[Pair]) -> list[Mark]:
    """Compare the slowest selector, and the one that needs most memory, with stock vLLM."""
    found = []
    for tower in dict.fromkeys(pair.tower for pair in pairs):
        ours = [pair for pair in pairs if pair.tower == tower and pair.name in BUILT_IN]
        most = MOST_TIMES[tower]
        slowest = max(ours, key=lambda pair: pair.times)
        found.append(
            Mark(
                f"{tower}: with any selector at most {most} of stock's time",
                f"{slowest.times:.2f} ({slowest.name}: {slowest.ours.seconds:.1f} s; "
                f"{slowest.stock.seconds:.1f} s)",
                slowest.times <= most,
            )
        )
        every = Compared(tuple(pair.times for pair in ours))
        found.append(
            Mark(
                f"{tower}: median over the selectors at most {most} of stock's time",
                str(every),
                None if every.interval is None else is_within(every.interval, most),
            )
        )
        largest = max(ours, key=lambda pair: pair.more)
        found.append(
            Mark(
                f"{tower}: memory at most stock's plus {MOST_MEMORY} MiB",
                f"{largest.more:+.0f} MiB ({largest.name}: {largest.ours.peak:.0f} MiB)",
                largest.more <= MOST_MEMORY,
            )
        )
        longest = max(ours, key=lambda pair: pair.waits)
        found.append(
            Mark(
                f"{tower}: other clients wait at most {MOST_WAIT} times as long as with stock",
                f"{longest.waits:.2f} ({longest.name}: {longest.ours.others:.1f} s)",
                longest.waits <= MOST_WAIT,
            )
        )
    return found


def pairs_table(pairs: Sequence[Pair], tower: str) -> str:
    """Return the table of one tower."""
    cells = [
        (
            pair.name,
            f"{pair.ours.seconds:.1f}",
            f"{pair.stock.seconds:.1f}",
            f"{pair.times:.2f}",
            f"{pair.ours.others:.1f}",
            f"{pair.ours.peak:.0f}",
            f"{pair.stock.peak:.0f}",
        )
        for pair in pairs
        if pair.tower == tower
    ]
    heads = (
        "request", "seconds", "stock's", "ratio", "slowest of others, s", "peak memory, MiB",
        "stock's, MiB",
    )  # fmt: skip
    return f"**Tower of {tower}**\n\n" + table(heads, cells)
