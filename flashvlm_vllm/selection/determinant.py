# SPDX-License-Identifier: Apache-2.0
"""Tokens that are each worth keeping and unlike one another: a greedy determinantal choice."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from flashvlm_vllm.selection.long_lists import choose_of_any
from flashvlm_vllm.selection.partition import cosine_gram

# Squared length beyond the span of the kept tokens that float32 cannot tell from rounding.
NO_NEWS: Final = 1e-6
AT_ONCE: Final = 512


def largest_determinant(similarity: Tensor, weight: Tensor, budget: int) -> Tensor:
    """Greedy maximum of ``det(diag(w) S diag(w))`` by an incremental Cholesky factorisation.

    Adding token `j` multiplies the determinant by ``w_j^2 r_j``, with `r_j` what is left of its
    squared length beyond the span of the kept tokens. Each step keeps the largest such factor and
    takes the new direction out of every `r`. A step reads the directions before it; every
    `AT_ONCE` steps those are taken out of all similarities in one product, so that a large budget
    does not take time with its square.

    Args:
        similarity: (N, N) float32 cosines, symmetric, without NaN; written into.
        weight: (N,) float32, above 0.
        budget: 1 to N.

    Returns:
        (budget,) int64, distinct, in order of selection. Nothing is read back from the device.
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
        # Rounding divided by rounding is no direction: it would feed on itself until NaN.
        directions[step] = torch.where(
            length > NO_NEWS, beyond / length.clamp_min(NO_NEWS).sqrt(), 0.0
        )
        left -= directions[step].square()
    return torch.cat(chosen)


def largest_determinant_of_any(features: Tensor, weight: Tensor, budget: int) -> Tensor:
    """`largest_determinant` of the cosines between features, a list of any length.

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
