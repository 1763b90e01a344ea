# SPDX-License-Identifier: Apache-2.0
"""Algorithm 1 as published: every round multiplies the features of its two halves again.

Our transcription of the loop's description, for one image, as the baseline of the benchmark.
"""

from __future__ import annotations

import torch
from torch import Tensor


def published_loop(features: Tensor, keep: int, removed_per_round: int = 8) -> Tensor:
    """Delete near-duplicates round by round until `keep` tokens are left.

    Args:
        features: (R, C) in list order: descending fused score.
        keep: tokens to leave, 1 to R.
        removed_per_round: at least 1.

    Returns:
        (keep,) int64 positions in `features`, in the order of the last round.
    """
    unit = features / features.norm(dim=-1, keepdim=True)
    left = torch.arange(features.shape[0], device=features.device)
    while left.shape[0] > keep:
        compared, anchors = left[0::2], left[1::2]
        largest = (unit[compared] @ unit[anchors].T).amax(dim=-1)
        by_similarity = largest.argsort(dim=-1, descending=True, stable=True)
        removed = min(removed_per_round, left.shape[0] - keep)
        left = torch.cat([compared[by_similarity[removed:]], anchors])
    return left


def published_partition(scores: Tensor, features: Tensor, budget: int) -> Tensor:
    """Half of the budget by score (eq 8), half by the loop, ascending.

    Args:
        scores: (N,) fused scores.
        features: (N, C).
        budget: 1 to N.

    Returns:
        (budget,) int64.
    """
    ranking = scores.argsort(descending=True, stable=True)
    important, residual = ranking[: budget // 2], ranking[budget // 2 :]
    diverse = residual[published_loop(features[residual], budget - budget // 2)]
    return torch.cat([important, diverse]).sort().values
