# SPDX-License-Identifier: Apache-2.0
"""Time and memory over the number of tokens, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.selection.sizes import Cell


def draw(cells: Sequence[Cell], share: float, path: Path) -> None:
    """Write an SVG of two panels with logarithmic axes, at one share of tokens kept."""
    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(10, 4))
    for method in dict.fromkeys(cell.method for cell in cells):
        there = [c for c in cells if c.method == method and c.share == share and c.ms is not None]
        counts = [cell.tokens for cell in there]
        time.plot(counts, [cell.ms for cell in there], marker="o", markersize=3, label=method)
        memory.plot(counts, [cell.peak_mib for cell in there], marker="o", markersize=3)
    time.set_ylabel("milliseconds")
    memory.set_ylabel("MiB of temporary tensors")
    for panel in (time, memory):
        panel.set(xscale="log", yscale="log", xlabel="visual tokens")
        panel.grid(alpha=0.3)
    time.legend(fontsize=8)
    figure.suptitle(f"Selecting {share:.0%} of the visual tokens")
    figure.tight_layout()
    # Neither date nor random names: the same measurements draw the same file.
    matplotlib.rcParams["svg.hashsalt"] = "selection"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
