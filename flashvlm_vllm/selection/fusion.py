# SPDX-License-Identifier: Apache-2.0
"""Fuses saliency and relevance into one score per visual token (eq 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from flashvlm_vllm.selection.config import SelectionConfig
from flashvlm_vllm.selection.padding import Padding
from flashvlm_vllm.selection.scaling import min_max


def fuse(
    intrinsic: Tensor, extrinsic: Tensor, config: SelectionConfig, tokens: Padding | None = None
) -> Tensor:
    """Eq 7: weighted geometric mean in the log domain, or the weighted sum of the ablation.

    The lower bound in the logarithms lets a token without relevance still be kept for its saliency;
    a factor of zero would exclude it.

    Args:
        intrinsic: (..., N) saliency in [0, 1].
        extrinsic: (..., N) relevance in [0, 1].
        config: weight, kind of fusion and floor.
        tokens: which tokens of a batch are real; None: all.

    Returns:
        (..., N) in [0, 1], min-max normalised, which keeps the ranking.
    """
    weight = config.text_weight
    if config.fusion == "linear":
        return min_max((1 - weight) * intrinsic + weight * extrinsic, config.epsilon, tokens)
    log_intrinsic = intrinsic.clamp_min(config.epsilon).log()
    log_extrinsic = extrinsic.clamp_min(config.epsilon).log()
    fused = torch.exp((1 - weight) * log_intrinsic + weight * log_extrinsic)
    return min_max(fused, config.epsilon, tokens)
