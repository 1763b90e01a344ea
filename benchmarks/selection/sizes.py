# SPDX-License-Identifier: Apache-2.0
"""Time and memory over the number of tokens, and over images at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from benchmarks.selection.clock import DEVICE, median_ms, peak_mib
from benchmarks.selection.growth import growth_exponent
from benchmarks.selection.methods import METHODS, Method, select_all
from benchmarks.selection.synthetic import Image, synthetic_image, synthetic_video

COUNTS: Final = (256, 576, 1024, 2048, 4096, 8192, 16384, 32768)
SHARES: Final = (0.22, 0.11, 0.056)
WIDTH: Final = 1024
BATCHES: Final = (1, 4, 16, 64)
LONGEST_MS: Final = 2500.0
MOST_PAIRS: Final = 2 * 2**30
"""Bytes of similarities of all pairs beyond which a method is not tried."""
FITTED: Final = (1024, 16384)
"""From and to which number of tokens the exponent of time is fitted."""


@dataclass(frozen=True)
class Cell:
    """One method at one size. Without times it was not measured, for the reason in `skipped`."""

    method: str
    tokens: int
    share: float
    ms: float | None
    peak_mib: float | None
    skipped: str | None = None


def measure_sizes() -> list[Cell]:
    """Every method at every size, unless it would take too long."""
    cells: dict[tuple[str, float], list[Cell]] = {}
    for count in COUNTS:
        video = synthetic_video(count, WIDTH, seed=count).to(DEVICE)
        for share in SHARES:
            for name, method in METHODS.items():
                row = cells.setdefault((name, share), [])
                row.append(_measure(name, method, video, share, row))
    return [cell for row in cells.values() for cell in row]


def _measure(
    name: str, method: Method, video: Image, share: float, smaller: Sequence[Cell]
) -> Cell:
    count = len(video.features)
    reason = None
    if smaller and smaller[-1].ms is None:
        reason = f"not tried after {smaller[-1].tokens}: {smaller[-1].skipped}"
    elif smaller and (last := smaller[-1]).ms is not None:
        expected = last.ms * (count / last.tokens) ** method.growth
        if expected > LONGEST_MS:
            reason = f"about {expected / 1e3:.0f} s expected"
    if method.all_pairs and 4 * count**2 > MOST_PAIRS:
        reason = f"similarities of all pairs take {4 * count**2 / 2**30:.0f} GiB"
    if reason is not None:
        return Cell(name, count, share, None, None, reason.split(": ")[-1])
    budget = round(share * count)
    return Cell(
        name,
        count,
        share,
        median_ms(partial(method.choose, video, budget)),
        peak_mib(partial(method.choose, video, budget)),
    )


def exponent(cells: Sequence[Cell], method: str, share: float) -> float:
    """Least-squares slope of log time over log size, between the sizes of `FITTED`."""
    fitted = [
        (cell.tokens, cell.ms)
        for cell in cells
        if cell.method == method
        and cell.share == share
        and cell.ms is not None
        and FITTED[0] <= cell.tokens <= FITTED[1]
    ]
    return growth_exponent([tokens for tokens, _ in fitted], [ms for _, ms in fitted])


@dataclass(frozen=True)
class Together:
    """Several images of 576 tokens in one call, 64 kept of each."""

    images: int
    ms: float
    peak_mib: float


def measure_batches() -> list[Together]:
    """LLaVA-1.5's shape: 1,024 wide before the projector and 4,096 after it."""
    images = [synthetic_image(WIDTH, seed).to(DEVICE) for seed in range(8)]
    results = []
    for size in BATCHES:
        batch = [images[number % len(images)] for number in range(size)]
        call = partial(select_all, batch, 64)
        results.append(Together(size, median_ms(call), peak_mib(call)))
    return results
