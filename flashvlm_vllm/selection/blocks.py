# SPDX-License-Identifier: Apache-2.0
"""Algorithm 1 on long lists: a fixed share per round, in blocks, linear in time and memory.

The paper's complexity analysis (sections 6 and 7) assumes that every round deletes at least a fixed
share of the list. The released code deletes eight tokens per round, for any length: the number of
rounds grows with N, and each round compares N^2 / 4 pairs. This module implements the schedule of
the analysis. Since even then all rounds together would take time with the square of N, every round
compares tokens in blocks of bounded length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashvlm_vllm.selection.scaling import unit_rows


def remove_near_duplicates_in_blocks(
    features: Tensor, keep: int, removed_fraction: float, block_length: int
) -> Tensor:
    """Algorithm 1, a share of the list per round, compared in blocks of it.

    A round works on a list of `left` tokens:

    1. It deletes ``floor(removed_fraction * left)`` tokens, at least 1 and at most ``left - keep``.
    2. The list is distributed over `m` blocks, the fewest of at most `block_length`: token `p` goes
       to block ``p mod m``. So every block covers the whole range of scores, and tokens are
       compared with other tokens in the next round.
    3. Each block runs a round of Algorithm 1: tokens at even positions are compared with those at
       odd positions, and the most similar even ones are deleted. All blocks delete the same number,
       or one more in the first blocks, which are also those that may be longer by one.
    4. The lists of the blocks are concatenated. Each has the remaining even tokens by descending
       similarity, followed by the odd ones.

    If the list fits into one block and one round is enough, the result is that of
    `remove_near_duplicates` with the same number removed per round.

    Work: a round takes ``left * block_length / 4`` products, the rounds together ``R *
    block_length / (4 * removed_fraction)``. Memory: two copies of the features and ``R *
    block_length / 4`` similarities.

    Args:
        features: (R, C) in list order: descending fused score, any float dtype. A row that is
            zero or not finite has similarity 0 to all others.
        keep: number of tokens to keep, 0 to R.
        removed_fraction: above 0, at most 0.5.
        block_length: at least 4.

    Returns:
        (keep,) int64 positions in the given list, in the order of the last round. If similarities
        are equal, the token that is earlier in the block is deleted first. Sizes depend on shapes
        only, so there is no synchronization with the device.
    """
    unit = unit_rows(features)
    left = features.shape[0] if keep else 0
    order = torch.arange(left, device=features.device)
    while left > keep:
        removed = min(max(1, math.floor(removed_fraction * left)), left - keep)
        order = _round(unit, order, removed, math.ceil(left / block_length))
        left -= removed
    return order


def _round(unit: Tensor, order: Tensor, removed: int, blocks: int) -> Tensor:
    """One round, which deletes `removed` tokens.

    Args:
        unit: (R, C) float32 of length 1, or not finite.
        order: (M,) int64 rows of `unit`, the list before the round.
        removed: at most M / 2.
        blocks: at most M / 2, so that every block has tokens to compare.

    Returns:
        (M - removed,) int64, the list after the round.
    """
    left, device = order.shape[0], order.device
    numbers = torch.arange(blocks, device=device)[:, None]
    longest = math.ceil(left / blocks)
    places = numbers + blocks * torch.arange(longest, device=device)
    tokens = order[places.clamp_max(left - 1)]
    compared, anchors = tokens[:, 0::2], tokens[:, 1::2]

    similarity = _rows(unit, compared) @ _rows(unit, anchors).mT
    similarity.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    # Only the last token of a block may be missing, in one of the two halves.
    missing = places >= left
    similarity.masked_fill_(missing[:, None, 1::2], -torch.inf)
    nearest = similarity.amax(dim=-1).masked_fill_(missing[:, 0::2], -torch.inf)
    most_similar_first = torch.argsort(nearest, dim=-1, descending=True, stable=True)

    lengths = (left - numbers + blocks - 1) // blocks
    halves = (lengths + 1) // 2
    less = removed // blocks + (numbers < removed % blocks).long()
    starts = torch.cumsum(lengths - less, dim=0) - (lengths - less)
    ranks = torch.arange(compared.shape[1], device=device)
    behind = torch.arange(anchors.shape[1], device=device)
    # Deleted and missing tokens are written after the end; each other position is written once.
    end = left - removed
    survives = (ranks >= less) & (ranks < halves)
    joined = order.new_empty(end + 1)
    joined[torch.where(survives, starts + ranks - less, end)] = compared.gather(
        1, most_similar_first
    )
    stays = behind < lengths - halves
    joined[torch.where(stays, starts + halves - less + behind, end)] = anchors
    return joined[:end]


def _rows(unit: Tensor, numbers: Tensor) -> Tensor:
    rows: Tensor = unit.index_select(0, numbers.flatten()).unflatten(0, numbers.shape)
    return rows
