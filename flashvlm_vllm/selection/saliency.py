# SPDX-License-Identifier: Apache-2.0
"""Intrinsic visual saliency, which does not depend on the question (eq 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from flashvlm_vllm.selection.padding import Padding
from flashvlm_vllm.selection.scaling import min_max


def intrinsic_saliency(attention: Tensor, epsilon: float, tokens: Padding | None = None) -> Tensor:
    """Eq 1: min-max normalise the attention that each visual token received.

    Args:
        attention: (..., N) attention averaged over heads, not normalised, any float dtype.
        epsilon: `SelectionConfig.epsilon`.
        tokens: which tokens of a batch are real; None: all.

    Returns:
        (..., N) float32 in [0, 1]; zeros when the attention is constant.
    """
    return min_max(attention.float(), epsilon, tokens)


def uniform_saliency(image_features: Tensor) -> Tensor:
    """The saliency of an image whose attention is unknown: the result of eq 1 for a constant.

    Args:
        image_features: (..., N, D).

    Returns:
        (..., N) float32 zeros on the same device.
    """
    return torch.zeros(image_features.shape[:-1], device=image_features.device)
