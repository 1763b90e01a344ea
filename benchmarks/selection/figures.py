# SPDX-License-Identifier: Apache-2.0
"""The targets of the selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from benchmarks.measuring.report import Mark
from benchmarks.selection.clips import Clip, clips_mark
from benchmarks.selection.clock import DEVICE, median_ms
from benchmarks.selection.methods import select_all
from benchmarks.selection.published import LOOP_SPEEDUP, MARKED_BUDGET, Result
from benchmarks.selection.selectors import Cost, exponent_marks
from benchmarks.selection.sizes import FITTED, Cell, exponent
from benchmarks.selection.synthetic import synthetic_image

LARGEST_EXPONENT: Final = 1.5
GPU_MARKS: Final = {
    "576 -> 64, batch 1, on the GPU": (1, 64, 0.5),
    "576 -> 64, batch 32, on the GPU": (32, 64, 2.0),
    "2880 -> 640 (five crops of 576), on the GPU": (5, 128, 1.5),
}
"""Images, tokens kept of each, milliseconds allowed."""


def marks(
    published: Sequence[Result], cells: Sequence[Cell], clips: Sequence[Clip], costs: Sequence[Cost]
) -> list[Mark]:
    """Compare measurements with the targets. On a GPU this measures, too."""
    found = []
    for row in published:
        if row.budget == MARKED_BUDGET:
            what = (
                f"Algorithm 1, {row.tokens} -> {row.budget}, width {row.width}: "
                f"at least {LOOP_SPEEDUP:.0f}x as fast"
            )
            speedup = row.loop_speedup
            enough = speedup >= LOOP_SPEEDUP
            found.append(Mark(what, f"{speedup:.1f}x", enough))
    same, images = sum(row.same_indices for row in published), sum(row.pairs for row in published)
    found.append(Mark("all indices of the published loop", f"{same}/{images}", same == images))
    for share in sorted({cell.share for cell in cells}):
        slope = exponent(cells, "flashvlm, video", share)
        what = f"video: exponent of time, {FITTED[0]} to {FITTED[1]} tokens, {share:.1%} kept"
        reached = slope <= LARGEST_EXPONENT
        found.append(Mark(f"{what}: <= {LARGEST_EXPONENT}", f"{slope:.2f}", reached))
    if DEVICE == "cuda":  # `benchmarks.gpu` has the committed figures of a GPU
        found += [_on_gpu(what, *numbers) for what, numbers in GPU_MARKS.items()]
    return [*found, clips_mark(clips), *exponent_marks(costs)]


def _on_gpu(what: str, images: int, budget: int, allowed: float) -> Mark:
    batch = [synthetic_image(1024, seed).to(DEVICE) for seed in range(images)]
    time = median_ms(lambda: select_all(batch, budget), repeats=20)
    return Mark(f"{what}: <= {allowed} ms", f"{time:.2f} ms", time <= allowed)
