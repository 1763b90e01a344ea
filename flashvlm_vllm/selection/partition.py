# SPDX-License-Identifier: Apache-2.0
"""The budget is split between the best scores (eq 8) and a diversity reserve (Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from flashvlm_vllm.selection.scaling import unit_rows

# Rows of the Gram matrix computed at a time; each block skips the columns that an earlier block
# already has by symmetry. Small enough to skip nearly half of the products, large enough to keep
# the matrix product efficient (on a CPU 48 and 64 rows measured best, 128 a tenth slower). A GPU
# needs larger ones to be filled by one of them.
GRAM_BLOCK_ROWS: Final = 64
GRAM_BLOCK_ROWS_CUDA: Final = 1024


def important_count(budget: int, important_fraction: float) -> int:
    """How many of the kept tokens the best scores get: ``floor(fraction * budget)``.

    The remainder goes to the diversity reserve, so an odd budget favours diversity (released
    code).

    Args:
        budget: tokens to keep, at least 1.
        important_fraction: in [0, 1].

    Returns:
        0 to budget.
    """
    return math.floor(important_fraction * budget)


def rank(scores: Tensor) -> Tensor:
    """Token indices by descending score (eq 8). Equal scores: the lower index first.

    Args:
        scores: (..., N) without NaN.

    Returns:
        (..., N) int64.
    """
    return torch.argsort(scores, dim=-1, descending=True, stable=True)


def cosine_gram(features: Tensor) -> Tensor:
    """All cosines between rows. Rows that are zero or not finite are similar to nothing (0).

    Args:
        features: (..., R, C), any float dtype.

    Returns:
        (..., R, R) float32, symmetric; R * R * 4 bytes per item.
    """
    unit = unit_rows(features)
    *items, count, _ = unit.shape
    gram = unit.new_empty(*items, count, count)
    rows = GRAM_BLOCK_ROWS_CUDA if unit.is_cuda else GRAM_BLOCK_ROWS
    # The rest is one block: for a product of a few rows a BLAS may take another routine, and
    # that rounds differently.
    starts = range(0, count - count % (2 * rows) + 1, rows)
    for start, stop in zip(starts, [*starts[1:], count], strict=True):
        block = gram[..., start:stop, start:]
        # Straight into its place: one copy of half the matrix less.
        torch.matmul(unit[..., start:stop, :], unit[..., start:, :].mT, out=block)
        gram[..., stop:, start:stop] = gram[..., start:stop, stop:].mT
    # A NaN would win every maximum of Algorithm 1 and with it make all tokens look alike.
    return gram.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def remove_near_duplicates(similarity: Tensor, keep: int, removed_per_round: int) -> Tensor:
    """Algorithm 1: delete the tokens most similar to others until `keep` are left.

    Each round splits the list by position into A (even) and B (odd), takes for every A its
    largest similarity to any B, and deletes the `removed_per_round` largest A (fewer in the last
    round, or when A is shorter). The list then becomes the surviving A by descending
    similarity, followed by B in its order, so that other tokens meet in the next round.

    The published loop multiplies the feature blocks of A and B anew every round. The features
    never change, so here all similarities are computed once and a round only looks them up. It
    reads whole rows of B, columns of already deleted tokens included: copying contiguous rows
    and taking their maximum element by element is faster than picking the A columns out of them.

    Args:
        similarity: (R, R) symmetric, without NaN, in list order: descending fused score.
        keep: tokens to leave, 0 to R.
        removed_per_round: at least 1.

    Returns:
        (keep,) int64 positions in the list given, in the order of the last round. Equal
        similarities: the earlier in the current list goes first. Round sizes depend on shapes
        only, so nothing is read back from the device.
    """
    left = similarity.shape[0] if keep else 0
    # Half of a round's time is the launch of its operations, which is cheaper in this mode. Its
    # tensors must not get out: they cannot be saved for a gradient.
    with torch.inference_mode():
        order = torch.arange(left, device=similarity.device)
        while left > keep:
            compared, anchors = order[0::2], order[1::2]
            removed = min(removed_per_round, left - keep, compared.shape[0])
            nearest = similarity.index_select(0, anchors).amax(dim=0).index_select(0, compared)
            most_similar_first = torch.argsort(nearest, descending=True, stable=True)
            survivors = compared.index_select(0, most_similar_first[removed:])
            order = torch.cat([survivors, anchors])
            left -= removed
    return order.clone()


def partition(
    scores: Tensor,
    diversity_features: Tensor,
    budget: int,
    important_fraction: float,
    removed_per_round: int,
) -> Tensor:
    """Section 3.2: the important tokens and a diverse remainder, in raster order.

    Args:
        scores: (N,) fused scores without NaN.
        diversity_features: (N, C) compared by cosine in Algorithm 1, any float dtype.
        budget: tokens to keep, 1 to N - 1.
        important_fraction: share of the budget for the best scores.
        removed_per_round: of Algorithm 1.

    Returns:
        (budget,) int64, distinct, ascending.
    """

    def diverse(listed: Tensor, keep: int) -> Tensor:
        return remove_near_duplicates(cosine_gram(listed), keep, removed_per_round)

    return partition_by(scores, diversity_features, budget, important_fraction, diverse)


def partition_by(
    scores: Tensor,
    diversity_features: Tensor,
    budget: int,
    important_fraction: float,
    diverse: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """`partition` with another way to thin out the remainder.

    Args:
        scores: (N,) fused scores without NaN.
        diversity_features: (N, C).
        budget: tokens to keep, 1 to N - 1.
        important_fraction: share of the budget for the best scores.
        diverse: from (R, C) features by descending score and a number to keep to as many
            positions in that list.

    Returns:
        (budget,) int64, distinct, ascending.
    """
    important = important_count(budget, important_fraction)
    ranking = rank(scores)
    kept, residual = ranking[:important], ranking[important:]
    if important < budget:
        listed = diversity_features.index_select(0, residual)
        kept = torch.cat([kept, residual.index_select(0, diverse(listed, budget - important))])
    return torch.sort(kept).values
