# SPDX-License-Identifier: Apache-2.0
"""Cost of the selection, compared with the published loop, other methods and the vision tower.

Run from the repository root: ``python -m benchmarks.selection.run --check``. On CUDA where there
is one, else on one CPU core.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar

import torch

from benchmarks.measuring.command import command_line, publish
from benchmarks.measuring.folders import committed
from benchmarks.measuring.report import marks_table
from benchmarks.selection import large_tables, tables
from benchmarks.selection.answers import measure_answers
from benchmarks.selection.clips import clips_table, measure_clips
from benchmarks.selection.clock import DEVICE
from benchmarks.selection.figures import marks
from benchmarks.selection.in_blocks import measure_in_blocks
from benchmarks.selection.large_tower import measure_rates
from benchmarks.selection.plot import draw
from benchmarks.selection.published import measure_published
from benchmarks.selection.sampled import measure_agreement, measure_saliency_times
from benchmarks.selection.schedule import measure_schedules
from benchmarks.selection.selectors import measure_selectors
from benchmarks.selection.sizes import SHARES, measure_batches, measure_sizes
from benchmarks.selection.tower import measure_tower

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Measured = TypeVar("Measured")


def main() -> int:
    """Measure; write results, tables and plot."""
    parser = command_line(__doc__)
    parser.add_argument("--pairs", type=int, default=21, help="images per row, at least 15")
    arguments = parser.parse_args()
    if arguments.pairs < 15:
        parser.error("--pairs must be at least 15: fewer make no stable median")

    torch.set_num_threads(1)
    start, load_before = time.monotonic(), os.getloadavg()[0]
    published = _step("published loop", lambda: measure_published(arguments.pairs))
    cells = _step("sizes", measure_sizes)
    batches = _step("batches", measure_batches)
    schedules = _step("schedules", measure_schedules)
    clips = _step("videos as served", measure_clips)
    tower = _step("vision tower", measure_tower)
    rates = _step("rates of a large tower", measure_rates)
    saliency = _step("saliency", lambda: measure_saliency_times(rates))
    agreements = _step("saliency from a sample of queries", measure_agreement)
    in_blocks = _step("choices in blocks", measure_in_blocks)
    answers = _step("answers after choices in blocks", measure_answers)
    costs = _step("built-in selectors", measure_selectors)  # last: see `clock.memory_kept`
    found = _step("targets", lambda: marks(published, cells, clips, costs))

    machine = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "one CPU core",
        "load_before": round(load_before, 1),
        "load_after": round(os.getloadavg()[0], 1),
        "seconds": round(time.monotonic() - start),
    }
    rows: dict[str, Sequence[DataclassInstance]] = {
        "published": published,
        "sizes": cells,
        "batches": batches,
        "schedules": schedules,
        "clips": clips,
        "tower": [tower],
        "selectors": costs,
        "tower_rates": [rates],
        "saliency": saliency,
        "agreements": agreements,
        "in_blocks": in_blocks,
        "answers": answers,
    }
    figures = {name: [asdict(row) for row in measured] for name, measured in rows.items()}
    report = "\n\n".join(
        [
            "<!-- SPDX-License-Identifier: Apache-2.0 -->",
            "Written by `python -m benchmarks.selection.run`: "
            + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine.items())
            + ".",
            marks_table(found),
            tables.published_table(published),
            tables.float64_line(published),
            *(tables.sizes_table(cells, share) for share in SHARES),
            tables.exponents_table(cells, SHARES[1]),
            tables.batches_table(batches),
            tables.schedules_table(schedules),
            clips_table(clips),
            tables.tower_line(tower),
            large_tables.selectors_table(costs, rates),
            large_tables.selector_exponents_table(costs),
            large_tables.saliency_times_table(saliency, rates),
            large_tables.agreement_table(agreements),
            large_tables.in_blocks_table(in_blocks),
            large_tables.answers_table(answers),
        ]
    )
    folder = arguments.output or committed("selection")
    status = publish(folder, {"machine": machine}, figures, found, report, check=arguments.check)
    draw(cells, SHARES[1], folder / "sizes.svg")
    return status


def _step(name: str, measure: Callable[[], Measured]) -> Measured:
    start = time.monotonic()
    result = measure()
    print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    return result


if __name__ == "__main__":
    sys.exit(main())
