# SPDX-License-Identifier: Apache-2.0
"""The measurements as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measuring.report import table
from benchmarks.selection.published import Result
from benchmarks.selection.schedule import Kept
from benchmarks.selection.sizes import Cell, Together, exponent
from benchmarks.selection.tower import Share


def published_table(results: Sequence[Result]) -> str:
    """One image next to the published loop."""
    head = [
        "tokens",
        "feature width",
        "whole selection: published → ours",
        "speed-up",
        "Algorithm 1 alone: published → ours",
        "speed-up",
        "same indices",
    ]
    rows = [
        [
            f"{r.tokens} → {r.budget}",
            r.width,
            f"{r.published_selection_ms:.1f} → {r.selection_ms:.1f} ms",
            f"{r.selection_speedup:.1f}x",
            f"{r.published_loop_ms:.1f} → {r.loop_ms:.1f} ms",
            f"**{r.loop_speedup:.1f}x**",
            f"{r.same_indices}/{r.pairs}",
        ]
        for r in results
    ]
    return table(head, rows)


def float64_line(results: Sequence[Result]) -> str:
    """Return a sentence about the published loop in float64."""
    same = sum(each.same_as_float64 for each in results)
    images = sum(each.pairs for each in results)
    return f"The published loop in float64 keeps the same tokens for {same} of {images} images."


def sizes_table(cells: Sequence[Cell], share: float) -> str:
    """Milliseconds and MiB of every method at one share of tokens kept."""
    chosen = [cell for cell in cells if cell.share == share]
    counts = sorted({cell.tokens for cell in chosen})
    rows = []
    for method in dict.fromkeys(cell.method for cell in chosen):
        by_count = {cell.tokens: cell for cell in chosen if cell.method == method}
        rows.append([method, *(_cell(by_count[count]) for count in counts)])
    return table([f"{share:.1%} kept", *(f"N = {count:,}" for count in counts)], rows)


def _cell(cell: Cell) -> str:
    if cell.ms is None or cell.peak_mib is None:
        return f"not tried: {cell.skipped}"
    return f"{cell.ms:.{1 if cell.ms < 100 else 0}f} ms, {cell.peak_mib:.0f} MiB"


def exponents_table(cells: Sequence[Cell], share: float) -> str:
    """Return the exponents of time of methods with at least three of the fitted sizes."""
    rows = []
    for method in dict.fromkeys(cell.method for cell in cells):
        there = [c for c in cells if c.method == method and c.share == share and c.ms is not None]
        largest = max(cell.tokens for cell in there)
        if largest >= 4096:
            rows.append([method, f"{exponent(cells, method, share):.2f}", f"{largest:,}"])
    return table(["method", "exponent of time", "largest N tried"], rows)


def batches_table(results: Sequence[Together]) -> str:
    """Images at once."""
    return table(
        ["images of 576 → 64", "time", "per image", "memory"],
        [
            [r.images, f"{r.ms:.1f} ms", f"{r.ms / r.images:.2f} ms", f"{r.peak_mib:.0f} MiB"]
            for r in results
        ],
    )


def schedules_table(results: Sequence[Kept]) -> str:
    """Return the tokens that the geometric schedule keeps."""
    return table(
        [
            "tokens",
            "schedule",
            "same tokens as fixed",
            "of the diverse half",
            "mean distance of a dropped token",
            "largest",
        ],
        [
            [
                r.tokens,
                r.way,
                f"{r.shared_with_fixed:.0%}",
                f"{r.diverse_shared:.0%}",
                f"{r.mean_distance:.3f}",
                f"{r.largest_distance:.3f}",
            ]
            for r in results
        ],
    )


def tower_line(share: Share) -> str:
    """One sentence."""
    return (
        f"A vision tower of CLIP-L/14-336's shape takes {share.tower_ms:,.0f} ms for one image on "
        f"the same machine, the selection of 64 of its 576 tokens {share.selection_ms:.1f} ms: "
        f"{share.percent:.2f} % of it."
    )
