# SPDX-License-Identifier: Apache-2.0
"""The fused score of every visual token, of one image or of a padded batch (eq 1 to 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from flashvlm_vllm.selection.config import SelectionConfig
from flashvlm_vllm.selection.fusion import fuse
from flashvlm_vllm.selection.padding import Padding
from flashvlm_vllm.selection.relevance import query_relevance
from flashvlm_vllm.selection.saliency import intrinsic_saliency, uniform_saliency


def score(
    image_features: Tensor,
    saliency: Tensor | None,
    text_embeds: Tensor | None,
    config: SelectionConfig,
    tokens: Padding | None = None,
    words: Padding | None = None,
) -> Tensor:
    """Eq 1 to 7. Memory grows with N times L and N times D.

    Args:
        image_features: (..., N, D) projected into the language model's space, any float dtype.
        saliency: (..., N) attention received, not normalised; None: uniform.
        text_embeds: (..., L, D) raw token embeddings; None or L == 0: saliency only.
        config: the constants of the method.
        tokens: which visual tokens of a batch are real; None: all.
        words: which words of a batch are real, none of an item without a question; None: all.

    Returns:
        (..., N) float32 in [0, 1], finite.
    """
    if saliency is None:
        intrinsic = uniform_saliency(image_features)
    else:
        intrinsic = intrinsic_saliency(saliency, config.epsilon, tokens)
    # Section 3.1: without a question, saliency only, for any weight of the text. Eq 7 with a
    # relevance of zero gives the same ranking, except that all saliencies below the lower bound
    # become equal.
    if text_embeds is None or text_embeds.shape[-2] == 0:
        return intrinsic
    extrinsic = query_relevance(image_features, text_embeds, config, tokens, words)
    fused = fuse(intrinsic, extrinsic, config, tokens)
    if words is None:
        return fused
    return torch.where(words.counts[:, None] > 0, fused, intrinsic)
