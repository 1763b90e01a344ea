# SPDX-License-Identifier: Apache-2.0
"""One image next to the published loop: how much faster, and the same tokens?"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from benchmarks.selection.clock import DEVICE, milliseconds
from benchmarks.selection.published_loop import published_loop, published_partition
from benchmarks.selection.synthetic import SIDE, synthetic_image
from flashvlm_vllm.selection import fused_scores, select_visual_tokens
from flashvlm_vllm.selection.partition import cosine_gram, remove_near_duplicates

BUDGETS: Final = (64, 128, 32)
WIDTHS: Final = (1024, 4096)
"""1024: vision tower features, before the projector. 4096: the projected features themselves."""
MARKED_BUDGET: Final = 64
LOOP_SPEEDUP: Final = 8.0
"""At least so many times faster must Algorithm 1 be at the marked budget."""


@dataclass(frozen=True)
class Result:
    """Medians over the pairs; times in milliseconds, speed-ups taken pair by pair."""

    tokens: int
    budget: int
    width: int
    pairs: int
    selection_ms: float
    published_selection_ms: float
    selection_speedup: float
    loop_ms: float
    published_loop_ms: float
    loop_speedup: float
    scoring_ms: float
    same_indices: int
    same_as_float64: int
    tokens_other_than_float64: float


def measure_published(pairs: int) -> list[Result]:
    """All rows of the table."""
    return [_measure(width, budget, pairs) for width in WIDTHS for budget in BUDGETS]


def _measure(width: int, budget: int, pairs: int) -> Result:
    """Alternate both implementations on a new image for every pair.

    They also take turns at being first, because the first finds the image outside the caches.
    """
    important, keep = budget // 2, budget - budget // 2

    def ours(features: Tensor, saliency: Tensor, text: Tensor, diversity: Tensor) -> Tensor:
        return select_visual_tokens(features, saliency, text, budget, diversity)

    def published(features: Tensor, saliency: Tensor, text: Tensor, diversity: Tensor) -> Tensor:
        return published_partition(fused_scores(features, saliency, text), diversity, budget)

    def our_loop(residual: Tensor) -> Tensor:
        return remove_near_duplicates(cosine_gram(residual), keep, removed_per_round=8)

    def their_loop(residual: Tensor) -> Tensor:
        return published_loop(residual, keep, removed_per_round=8)

    warm_up = synthetic_image(width, seed=pairs).to(DEVICE)
    ours(*warm_up)
    published(*warm_up)

    times: list[tuple[float, float, float, float, float]] = []
    same = same_float64 = 0
    different: list[int] = []
    for seed in range(pairs):
        image = synthetic_image(width, seed).to(DEVICE)
        if seed % 2:
            published_whole, expected = milliseconds(published, *image)
            whole, kept = milliseconds(ours, *image)
        else:
            whole, kept = milliseconds(ours, *image)
            published_whole, expected = milliseconds(published, *image)
        scoring, scores = milliseconds(fused_scores, image.features, image.saliency, image.text)
        residual = image.diversity[scores.argsort(descending=True, stable=True)[important:]]
        loop, positions = milliseconds(our_loop, residual)
        published_only, expected_positions = milliseconds(their_loop, residual)
        times.append((whole, published_whole, loop, published_only, scoring))
        # The loop's list order is the stricter test: it shows a swap that no round acted on.
        same += torch.equal(kept, expected) and torch.equal(positions, expected_positions)
        exact = published_partition(scores, image.diversity.double(), budget)
        different.append(budget - int(torch.isin(kept, exact).sum()))
        same_float64 += different[-1] == 0

    whole, published_whole, loop, published_only, scoring = map(
        statistics.median, zip(*times, strict=True)
    )
    return Result(
        tokens=SIDE * SIDE,
        budget=budget,
        width=width,
        pairs=pairs,
        selection_ms=whole,
        published_selection_ms=published_whole,
        selection_speedup=statistics.median(t[1] / t[0] for t in times),
        loop_ms=loop,
        published_loop_ms=published_only,
        loop_speedup=statistics.median(t[3] / t[2] for t in times),
        scoring_ms=scoring,
        same_indices=same,
        same_as_float64=same_float64,
        tokens_other_than_float64=statistics.mean(different),
    )
