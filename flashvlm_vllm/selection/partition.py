# SPDX-License-Identifier: Apache-2.0
"""Splits the budget between the best scores (eq 8) and a diversity reserve (Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from flashvlm_vllm.selection.scaling import unit_rows

# Rows of the Gram matrix computed at a time; each block skips the columns that an earlier block
# has already computed, by symmetry. Small enough to skip nearly half of the products, large enough
# for an efficient matrix product (on a CPU 48 and 64 rows were fastest, 128 rows 10 % slower). A
# GPU needs larger blocks to be fully used.
GRAM_BLOCK_ROWS: Final = 64
GRAM_BLOCK_ROWS_CUDA: Final = 1024


def important_count(budget: int, important_fraction: float) -> int:
    """Number of kept tokens with the best scores: ``floor(fraction * budget)``.

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
    """All cosines between rows; 0 for rows that are zero or not finite.

    Args:
        features: (..., R, C), any float dtype.

    Returns:
        (..., R, R) float32, symmetric; R * R * 4 bytes per item.
    """
    unit = unit_rows(features)
    *items, count, _ = unit.shape
    gram = unit.new_empty(*items, count, count)
    rows = GRAM_BLOCK_ROWS_CUDA if unit.is_cuda else GRAM_BLOCK_ROWS
    # The remaining rows are part of the last block: for a product of few rows a BLAS may use
    # another routine, which rounds differently.
    starts = range(0, count - count % (2 * rows) + 1, rows)
    for start, stop in zip(starts, [*starts[1:], count], strict=True):
        block = gram[..., start:stop, start:]
        # Write into the result directly: this saves a copy of half the matrix.
        torch.matmul(unit[..., start:stop, :], unit[..., start:, :].mT, out=block)
        gram[..., stop:, start:stop] = gram[..., start:stop, stop:].mT
    # A NaN would be the maximum of every comparison in Algorithm 1, so all similarities would be
    # equal.
    return gram.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def remove_near_duplicates(similarity: Tensor, keep: int, removed_per_round: int) -> Tensor:
    """Algorithm 1: delete the tokens most similar to others until `keep` are left.

    Each round splits the list by position into A (even) and B (odd), takes for every A its
    largest similarity to any B, and deletes the `removed_per_round` largest A (fewer in the last
    round, or when A is shorter). The list then becomes the surviving A by descending
    similarity, followed by B in its order, so that other tokens meet in the next round.

    The published loop multiplies the feature blocks of A and B again in every round. The features
    do not change, so here all similarities are computed once and a round only reads them. It reads
    whole rows of B, including the columns of deleted tokens: copying contiguous rows and taking
    their elementwise maximum is faster than gathering the columns of A.

    Args:
        similarity: (R, R) symmetric, without NaN, in list order: descending fused score.
        keep: number of tokens to keep, 0 to R.
        removed_per_round: at least 1.

    Returns:
        (keep,) int64 positions in the given list, in the order of the last round. If similarities
        are equal, the token that is earlier in the current list is deleted first. Round sizes
        depend on shapes only, so there is no synchronization with the device.
    """
    left = similarity.shape[0] if keep else 0
    # Half of a round's time is the overhead of its operations, which is smaller in this mode. Its
    # tensors must not be returned: they cannot be saved for a gradient.
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
        removed_per_round: tokens that a round of Algorithm 1 deletes.

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
    """`partition` with another function to select the diverse remainder.

    Args:
        scores: (N,) fused scores without NaN.
        diversity_features: (N, C).
        budget: tokens to keep, 1 to N - 1.
        important_fraction: share of the budget for the best scores.
        diverse: maps (R, C) features by descending score and the number of tokens to keep to that
            number of positions in the list.

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
