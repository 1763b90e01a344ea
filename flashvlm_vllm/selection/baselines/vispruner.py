# SPDX-License-Identifier: Apache-2.0
"""VisPruner (arXiv 2412.01818, ICCV 2025): tokens by attention, and a remainder without duplicates.

FlashVLM's Algorithm 1 is VisPruner's loop, so this is FlashVLM without a question: the same
partition with the saliency alone as score. With ``important_fraction=1`` it is FasterVLM, the
first version of the same paper: the tokens with the highest saliency only.

Deviations from the released code:

* Equal saliencies and equal similarities resolve to the earlier token; in the released code the
  order is undefined.
* Every budget gives the exact number of tokens; the released code fails with an odd number of
  residual tokens and with very small budgets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashvlm_vllm.selection.arguments import check_count, check_tensor
from flashvlm_vllm.selection.config import SelectionConfig
from flashvlm_vllm.selection.partition import partition
from flashvlm_vllm.selection.saliency import intrinsic_saliency


def vispruner(
    saliency: Tensor, features: Tensor, budget: int, important_fraction: float = 0.5
) -> Tensor:
    """Indices of the tokens that VisPruner keeps.

    Args:
        saliency: (N,) attention received (CLS row of the last layer but one, mean over heads),
            not normalised, any float dtype. A non-finite entry counts as the lowest.
        features: (N, C) compared in the loop; the method takes them before the projector.
        budget: tokens to keep, at least 1; N or more keeps all.
        important_fraction: share of the budget for the best saliencies, in [0, 1]. One half by
            default in the released code; its README also shows 0.75.

    Returns:
        (min(budget, N),) int64, ascending, on the device of `features`.

    Raises:
        TypeError: the budget is not an int or a tensor is not floating point.
        ValueError: a number is out of range, or shapes or devices do not match.
    """
    check_count("budget", budget)
    check_tensor("features", features, ("N", "C"), like=features)
    count = features.shape[0]
    check_tensor("saliency", saliency, (count,), like=features)
    config = SelectionConfig(important_fraction=important_fraction)
    if budget >= count:
        return torch.arange(count, device=features.device)
    with torch.no_grad():
        return partition(
            intrinsic_saliency(saliency, config.epsilon),
            features,
            budget,
            config.important_fraction,
            config.removed_per_round,
        )
