# SPDX-License-Identifier: Apache-2.0
"""DivPrune (arXiv 2503.02175, CVPR 2025): keep tokens that are far from one another.

The paper treats pruning as a max-min diversity problem: the smallest cosine distance between two
kept tokens should be as large as possible. This is NP-hard; the method solves it greedily. It uses
neither attention nor the question.

Written from the description of the method. Deviations and choices of our own:

* Distances below `NO_DISTANCE` count as zero, so that exact copies are equal and the lower index
  is kept, regardless of the rounding of matrix products.
* A token whose vector is zero or not finite has no direction. It is no token's neighbour and is
  kept only after all others; as published, it would be at distance 1 from all others and among the
  first.
* The result is in raster order, not in order of selection.
* Lists of more than 4,096 tokens are selected from in two rounds of blocks (`long_lists`).
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from flashvlm_vllm.selection.arguments import check_count, check_tensor
from flashvlm_vllm.selection.long_lists import choose_of_any
from flashvlm_vllm.selection.partition import cosine_gram

# Rounding in a float32 product of two unit vectors stays below this.
NO_DISTANCE: Final = 1e-6
# Used as the distance of a token without a direction: below all distances, above the value of kept
# tokens.
BROKEN: Final = -1.0


def divprune(image_features: Tensor, budget: int) -> Tensor:
    """Indices of tokens that are far apart.

    Up to 4,096 tokens O(N^2 C) for the distances and O(N T) for the rest; linear in N above that.

    1. Keep the token whose nearest neighbour is farthest.
    2. Repeatedly keep the token whose nearest kept token is farthest.

    Args:
        image_features: (N, D), any float dtype; the paper takes them after the projector.
        budget: tokens to keep, at least 1; N or more keeps all.

    Returns:
        (min(budget, N),) int64, ascending, on the device of `image_features`.

    Raises:
        TypeError: the budget is not an int or the features are not floating point.
        ValueError: the budget is below 1 or the shape does not match.
    """
    check_count("budget", budget)
    check_tensor("image_features", image_features, ("N", "D"), like=image_features)
    if budget >= image_features.shape[0]:
        return torch.arange(image_features.shape[0], device=image_features.device)
    with torch.no_grad():
        # All weights are equal: tokens are distributed over blocks in raster order.
        alike = torch.zeros(len(image_features), device=image_features.device)
        kept = choose_of_any(image_features, alike, budget, _farthest_first)
        return torch.sort(kept).values


def _farthest_first(features: Tensor, _: Tensor, budget: int) -> Tensor:
    similarity = cosine_gram(features)
    # A unit vector has a product of 1 with itself, a zero or non-finite one of 0.
    broken = similarity.diagonal() < 0.5
    distance = similarity.neg_().add_(1.0)
    distance.masked_fill_(distance < NO_DISTANCE, 0.0)
    distance.masked_fill_(broken, math.inf)  # whole columns: no token's neighbour
    distance.fill_diagonal_(math.inf)

    nearest = distance.amin(dim=1).masked_fill(broken, BROKEN)
    chosen = [nearest.argmax().view(1)]
    nearest = torch.full_like(nearest, math.inf).masked_fill(broken, BROKEN)
    for _step in range(budget - 1):
        to_newest = distance.index_select(0, chosen[-1])[0]
        nearest = torch.minimum(nearest, to_newest).index_fill(0, chosen[-1], -math.inf)
        chosen.append(nearest.argmax().view(1))
    return torch.cat(chosen)
