# SPDX-License-Identifier: Apache-2.0
"""Algorithm 1 on long lists: a fixed share per round, in blocks, linear in time and memory.

The paper bounds its algorithm (sections 6 and 7) by assuming that every round deletes at least a
fixed share of the list. The released code deletes eight tokens, whatever the length: its rounds
grow with N, and each compares N^2 / 4 pairs. This is the schedule that the analysis assumes, and,
because a sum of N^2 over shrinking lists still is a square, every round in blocks of bounded
length.
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

    1. It deletes ``floor(removed_fraction * left)`` tokens, at least 1 and at most what is too
       many.
    2. The list is dealt out, like cards, to the fewest blocks of at most `block_length`: token
       `p` goes to block ``p mod m``. So every block spans all scores, and tokens meet others in
       the next round.
    3. In each block Algorithm 1's round takes place: even against odd positions, the most
       similar even ones are deleted. Every block deletes equally many, or one more in the first
       ones, which are also those that may be longer by one.
    4. The blocks' lists, each the survivors by descending similarity and then the odd ones, are
       joined, block after block.

    With lists that fit one block and one round's worth to delete this is `remove_near_duplicates`
    with that many removed per round.

    Work: a round takes ``left * block_length / 4`` products, the rounds together ``R *
    block_length / (4 * removed_fraction)``. Memory: two copies of the features and ``R *
    block_length / 4`` similarities.

    Args:
        features: (R, C) in list order: descending fused score, any float dtype. A row that is
            zero or not finite is similar to nothing.
        keep: tokens to leave, 0 to R.
        removed_fraction: above 0, at most 0.5.
        block_length: at least 4.

    Returns:
        (keep,) int64 positions in the list given, in the order of the last round. Equal
        similarities: the earlier in the block goes first. Sizes depend on shapes only, so
        nothing is read back from the device.
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
    """One round: `removed` tokens less.

    Args:
        unit: (R, C) float32 of length 1, or not finite.
        order: (M,) int64 rows of `unit`, the list before.
        removed: at most M / 2.
        blocks: at most M / 2, so that each has something to be compared with.

    Returns:
        (M - removed,) int64, the list after.
    """
    left, device = order.shape[0], order.device
    numbers = torch.arange(blocks, device=device)[:, None]
    longest = math.ceil(left / blocks)
    places = numbers + blocks * torch.arange(longest, device=device)
    tokens = order[places.clamp_max(left - 1)]
    compared, anchors = tokens[:, 0::2], tokens[:, 1::2]

    similarity = _rows(unit, compared) @ _rows(unit, anchors).mT
    similarity.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    # Only the last card of a block may be missing, and it is in one of the two halves.
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
    # What is deleted or missing is written behind the end; each other place is written once.
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
