# SPDX-License-Identifier: Apache-2.0
"""Targets and tables of the requests with a large image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.measuring.report import Mark, marks_table, table
from flashvlm_vllm.selection.registry import BUILT_IN

MOST_TIMES: Final = {"two layers": 1.3, "32 layers": 1.0}
"""The longest time of a request, relative to stock vLLM."""
MOST_MEMORY: Final = 512
"""MiB that a process may need beyond stock's."""
MOST_WAIT: Final = 1.2
"""The longest time of another client's request, relative to stock vLLM."""


@dataclass(frozen=True)
class Row:
    """One request with a large image."""

    tower: str
    name: str
    seconds: float
    """Until its one output token."""
    others: float
    """Seconds of the slowest request of the other clients during that time."""
    peak: float
    """Peak memory of the server's largest process during that time, in MiB."""


def report(rows: Sequence[Row]) -> str:
    """Return targets and tables as Markdown."""
    towers = dict.fromkeys(row.tower for row in rows)
    return "\n\n".join([marks_table(marks(rows)), *(rows_table(rows, each) for each in towers)])


def stock_of(rows: Sequence[Row], tower: str) -> Row:
    """Return the row of the server without the plugin."""
    return next(row for row in rows if row.tower == tower and row.name == "stock")


def marks(rows: Sequence[Row]) -> list[Mark]:
    """Compare the slowest selector, and the one that needs most memory, with stock vLLM."""
    found = []
    for tower in dict.fromkeys(row.tower for row in rows):
        stock = stock_of(rows, tower)
        ours = [row for row in rows if row.tower == tower and row.name in BUILT_IN]
        slowest = max(ours, key=lambda row: row.seconds)
        times = slowest.seconds / stock.seconds
        found.append(
            Mark(
                f"{tower}: with any selector at most {MOST_TIMES[tower]} of stock's time",
                f"{times:.2f} ({slowest.name}: {slowest.seconds:.1f} s; {stock.seconds:.1f} s)",
                times <= MOST_TIMES[tower],
            )
        )
        largest = max(ours, key=lambda row: row.peak)
        more = largest.peak - stock.peak
        found.append(
            Mark(
                f"{tower}: memory at most stock's plus {MOST_MEMORY} MiB",
                f"{more:+.0f} MiB ({largest.name}: {largest.peak:.0f} MiB)",
                more <= MOST_MEMORY,
            )
        )
        waits = max(ours, key=lambda row: row.others)
        found.append(
            Mark(
                f"{tower}: other clients wait at most {MOST_WAIT} times as long as with stock",
                f"{waits.others / stock.others:.2f} ({waits.name}: {waits.others:.1f} s)",
                waits.others <= MOST_WAIT * stock.others,
            )
        )
    return found


def rows_table(rows: Sequence[Row], tower: str) -> str:
    """Return the table of one tower."""
    stock = stock_of(rows, tower)
    cells = [
        (
            row.name,
            f"{row.seconds:.1f}",
            f"{row.seconds / stock.seconds:.2f}",
            f"{row.others:.1f}",
            f"{row.peak:.0f}",
        )
        for row in rows
        if row.tower == tower
    ]
    heads = ("request", "seconds", "of stock's", "slowest of others, s", "peak memory, MiB")
    return f"**Tower of {tower}**\n\n" + table(heads, cells)
