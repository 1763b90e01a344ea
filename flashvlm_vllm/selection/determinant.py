# SPDX-License-Identifier: Apache-2.0
"""Greedy determinant maximisation: tokens with large weights that differ from one another."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from flashvlm_vllm.selection.long_lists import choose_of_any
from flashvlm_vllm.selection.partition import cosine_gram

# Squared length outside the span of the kept tokens that is not distinguishable from rounding.
NO_NEWS: Final = 1e-6
AT_ONCE: Final = 512


def largest_determinant(similarity: Tensor, weight: Tensor, budget: int) -> Tensor:
    """Greedy maximum of ``det(diag(w) S diag(w))`` by an incremental Cholesky factorisation.

    Adding token `j` multiplies the determinant by ``w_j^2 r_j``, where `r_j` is the part of its
    squared length outside the span of the kept tokens. Each step keeps the token with the largest
    factor and subtracts the new direction from every `r`. A step reads all previous directions;
    every `AT_ONCE` steps they are subtracted from all similarities in one product, so that the time
    does not grow with the square of the budget.

    Args:
        similarity: (N, N) float32 cosines, symmetric, without NaN; modified in place.
        weight: (N,) float32, above 0.
        budget: 1 to N.

    Returns:
        (budget,) int64, distinct, in order of selection. There is no synchronization with the
        device.
    """
    left = similarity.diagonal().clone()
    priority = weight.square()
    directions = similarity.new_zeros(min(budget, AT_ONCE), similarity.shape[0])
    chosen = []
    for number in range(budget):
        step = number % AT_ONCE
        if number and step == 0:
            similarity.addmm_(directions.T, directions, alpha=-1.0)
        best = (priority * left.clamp_min(NO_NEWS)).argmax().view(1)
        chosen.append(best)
        priority.index_fill_(0, best, -1.0)  # below every candidate from now on

        earlier = directions[:step]
        beyond = similarity.index_select(0, best)[0] - earlier.index_select(1, best)[:, 0] @ earlier
        length = left.index_select(0, best)
        # A direction computed from rounding errors alone would grow in every step up to NaN.
        directions[step] = torch.where(
            length > NO_NEWS, beyond / length.clamp_min(NO_NEWS).sqrt(), 0.0
        )
        left -= directions[step].square()
    return torch.cat(chosen)


def largest_determinant_of_any(features: Tensor, weight: Tensor, budget: int) -> Tensor:
    """`largest_determinant` of the cosines between features, for lists of any length.

    Args:
        features: (N, C), any float dtype.
        weight: (N,) float32, above 0.
        budget: 1 to N.

    Returns:
        (budget,) int64, distinct; in order of selection up to `long_lists.MOST_PAIRED` tokens.
    """

    def choose(features: Tensor, weight: Tensor, budget: int) -> Tensor:
        return largest_determinant(cosine_gram(features), weight, budget)

    return choose_of_any(features, weight, budget, choose)
