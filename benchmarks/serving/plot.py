# SPDX-License-Identifier: Apache-2.0
"""The measured loads as a plot."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.measuring.drawing import blank
from benchmarks.serving.figures import Measured, Residency
from benchmarks.serving.plan import COLUMNS


def plot(levels: Sequence[Measured], residency: Mapping[str, Residency], file: Path) -> None:
    """Draw throughput and median TTFT per load, and how many requests fit into the KV cache."""
    figure = blank(13, 4)
    speed, ttft, fit = figure.subplots(1, 3)
    width = 0.8 / len(COLUMNS)
    for place, column in enumerate(COLUMNS):
        at = [index + (place - (len(COLUMNS) - 1) / 2) * width for index in range(len(levels))]
        turns = [one.turns[column] for one in levels]
        speed.bar(at, [statistics.median(t.requests_per_second for t in each) for each in turns],
                  width, label=column)  # fmt: skip
        ttft.bar(at, [statistics.median(x for t in each for x in t.ttfts) for each in turns], width)
    for axes, title in ((speed, "requests/s"), (ttft, "TTFT p50, s (log)")):
        axes.set_title(title)
        axes.set_xticks(range(len(levels)), [one.level.name.replace(", ", "\n") for one in levels])
    ttft.set_yscale("log")
    speed.legend(title="budget", frameon=False)
    colours = [f"C{place}" for place in range(len(residency))]
    fit.bar(list(residency), [one.computed for one in residency.values()], color=colours)
    fit.set_title("requests that fit into the same KV cache")
    figure.savefig(file, dpi=110)
