# SPDX-License-Identifier: Apache-2.0
"""All rounds of Algorithm 1 in one launch. The torch version is `remove_near_duplicates`.

In eager torch a round is seven small kernels, so 576 -> 64 tokens are 450 launches, whose overhead
is most of the time. Here one program runs all rounds of one item; items run in parallel.

Cost. A round reads whole rows of its anchors, coalesced. About half of the R columns are needed,
but reading only those would load the same sectors. Over all rounds these are about ``R^3 / (4 r)``
numbers, with r removed per round, from the L2 cache at the rate of one multiprocessor (tens of
bytes per clock): about 0.2 ms for 576 -> 64. The time grows with R^3, and one item uses only one
multiprocessor: a single list of 3,000 takes tens of milliseconds, 64 such lists not more. These are
estimates, not measurements. For long lists, use the geometric schedule.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS: Final = 16
"""Warps per program. A program occupies a multiprocessor; half of its threads hide most of the
latency."""


@triton.jit  # type: ignore[untyped-decorator]
def _rounds(  # type: ignore[no-untyped-def]
    similarity,  # (B, R, R) float32
    lengths,  # (B,) int64
    keeps,  # (B,) int64
    orders,  # (B, 2, R) int32, scratch: the list before and after a round
    nearest,  # (B, 2, R) float32, scratch: by token, then by position among the compared
    kept,  # (B, K) int64, output
    removed_per_round,
    width,  # R
    kept_width,  # K
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPARED: tl.constexpr,
    OTHERS: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    # Up to 64 x 3,000^2 numbers, which exceeds int32; offsets within an item fit into it.
    gram = similarity + item * width * width
    by_token = nearest + item * 2 * width
    by_place = by_token + width
    lists = orders + item * 2 * width
    left = tl.load(lengths + item).to(tl.int32)
    keep = tl.load(keeps + item).to(tl.int32)

    for start in range(0, left, COLUMNS):
        tokens = start + tl.arange(0, COLUMNS)
        tl.store(lists + tokens, tokens, mask=tokens < left)
    tl.debug_barrier()

    half = 0
    while left > keep:
        before = lists + half * width
        half = 1 - half
        after = lists + half * width
        compared = (left + 1) // 2
        anchors = left // 2
        removed = tl.minimum(tl.minimum(removed_per_round, left - keep), compared)

        # The largest similarity of every token to an anchor, including deleted tokens and anchors:
        # skipping their columns would break up the reads.
        for start in range(0, width, COLUMNS):
            tokens = start + tl.arange(0, COLUMNS)
            largest = tl.full((ROWS, COLUMNS), -float("inf"), tl.float32)
            for first in range(0, anchors, ROWS):
                numbers = first + tl.arange(0, ROWS)
                rows = tl.load(before + 2 * numbers + 1, mask=numbers < anchors, other=0)
                there = (numbers < anchors)[:, None] & (tokens < width)[None, :]
                places = rows[:, None] * width + tokens[None, :]
                found = tl.load(gram + places, mask=there, other=-float("inf"))
                largest = tl.maximum(largest, found)
            tl.store(by_token + tokens, tl.max(largest, axis=0), mask=tokens < width)
        # Other threads of the program read the values written above.
        tl.debug_barrier()

        for start in range(0, compared, COLUMNS):
            places = start + tl.arange(0, COLUMNS)
            tokens = tl.load(before + 2 * places, mask=places < compared, other=0)
            found = tl.load(by_token + tokens, mask=places < compared)
            tl.store(by_place + places, found, mask=places < compared)
        tl.debug_barrier()

        # A stable descending order, by counting the tokens that come earlier. Unlike a sort, this
        # needs no state in registers between steps.
        for start in range(0, compared, COMPARED):
            places = start + tl.arange(0, COMPARED)
            mine = tl.load(by_place + places, mask=places < compared, other=0.0)
            earlier = tl.zeros((COMPARED, OTHERS), tl.int32)
            for first in range(0, compared, OTHERS):
                others = first + tl.arange(0, OTHERS)
                theirs = tl.load(by_place + others, mask=others < compared, other=0.0)
                above = theirs[None, :] > mine[:, None]
                tied = theirs[None, :] == mine[:, None]
                ahead = above | (tied & (others[None, :] < places[:, None]))
                earlier += (ahead & (others < compared)[None, :]).to(tl.int32)
            rank = tl.sum(earlier, axis=1) - removed
            tokens = tl.load(before + 2 * places, mask=places < compared, other=0)
            tl.store(after + rank, tokens, mask=(places < compared) & (rank >= 0))
        for start in range(0, anchors, COLUMNS):
            numbers = start + tl.arange(0, COLUMNS)
            tokens = tl.load(before + 2 * numbers + 1, mask=numbers < anchors, other=0)
            tl.store(after + compared - removed + numbers, tokens, mask=numbers < anchors)
        tl.debug_barrier()
        left -= removed

    final = lists + half * width
    for start in range(0, keep, COLUMNS):
        places = start + tl.arange(0, COLUMNS)
        tokens = tl.load(final + places, mask=places < keep, other=0)
        tl.store(kept + item * kept_width + places, tokens.to(tl.int64), mask=places < keep)


def remove_near_duplicates_batched(
    similarity: Tensor,
    lengths: Tensor,
    keeps: Tensor,
    most_kept: int,
    removed_per_round: int,
    *,
    tile: tuple[int, int, int, int] = (32, 256, 256, 32),
) -> Tensor:
    """Algorithm 1 for several lists at once, each as `remove_near_duplicates` does it.

    Args:
        similarity: (B, R, R) contiguous float32 without NaN or infinities, in list order. Values
            beyond an item's length are not used. Fastest if R is a multiple of 16.
        lengths: (B,) int64 lengths of the lists, 1 to R.
        keeps: (B,) int64 numbers of tokens to keep, at most the length.
        most_kept: the largest of `keeps`.
        removed_per_round: at least 1.
        tile: block sizes for rows, columns, compared tokens and the tokens they are ranked against,
            powers of two; the default fits into the registers of the threads.

    Returns:
        (B, most_kept) int64 positions, identical to those of the torch version; zeros after the
        first ``keeps[i]`` of item `i`. There is no synchronization with the device.
    """
    batch, width, _ = similarity.shape
    orders = torch.empty(batch, 2, width, dtype=torch.int32, device=similarity.device)
    nearest = torch.empty(batch, 2, width, device=similarity.device)
    kept = torch.zeros(batch, most_kept, dtype=torch.int64, device=similarity.device)
    rows, columns, compared, others = tile
    _rounds[(batch,)](
        similarity,
        lengths,
        keeps,
        orders,
        nearest,
        kept,
        removed_per_round,
        width,
        most_kept,
        ROWS=rows,
        COLUMNS=columns,
        COMPARED=compared,
        OTHERS=others,
        num_warps=WARPS,
    )
    return kept
