# SPDX-License-Identifier: Apache-2.0
"""Ratios of the starts, targets and the table."""

import statistics
from typing import Final

from benchmarks.measuring.pairs import TOLERANCE, Compared, compare, is_within
from benchmarks.measuring.report import Mark, marks_table, table

FIGURES: Final = {"seconds": "seconds to start", "mib": "peak of resident memory, MiB"}
Runs = dict[str, list[dict[str, float]]]
"""Starts by server, each with the figures of ``FIGURES``."""


def marks(runs: Runs) -> list[Mark]:
    """Judge the ratios: the whole interval beyond 2 % is a measurable change."""
    found = []
    for figure, label in FIGURES.items():
        compared = ratio(runs, figure)
        met = None if compared.interval is None else is_within(compared.interval)
        found.append(
            Mark(
                f"flashvlm / stock, {label}: at most {TOLERANCE - 1:.0%} more",
                format(compared, ".3f"),
                met,
            )
        )
    return found


def ratio(runs: Runs, figure: str) -> Compared:
    """Compare the starts pair by pair."""
    ours, theirs = ([each[figure] for each in runs[name]] for name in ("flashvlm", "stock"))
    return compare(ours, theirs)


def report(runs: Runs) -> str:
    """Return targets and medians as Markdown."""
    rows = [
        [name, *(f"{statistics.median(each[figure] for each in own):.1f}" for figure in FIGURES)]
        for name, own in runs.items()
    ]
    return f"{marks_table(marks(runs))}\n\n{table(['server', *FIGURES.values()], rows)}"
