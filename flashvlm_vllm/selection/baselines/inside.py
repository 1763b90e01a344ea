# SPDX-License-Identifier: Apache-2.0
"""FastV's and SparseVLM's scores, used before the language model instead of inside it.

Both methods prune inside the language model, after layers that saw all tokens, so they need other
attention kernels and a KV cache with a different length in every layer. Here their scores come from
`LanguageAttention`, and the tokens are dropped before the first layer. So all layers save them, but
the words do not read the dropped tokens in the first layers. SparseVLM's merging is left out.
Written from the descriptions of the methods.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashvlm_vllm.selection.arguments import check_count, check_tensor
from flashvlm_vllm.selection.partition import rank


def fastv_boundary(attention: Tensor, budget: int) -> Tensor:
    """The tokens with the most attention from the prompt's last word (arXiv 2403.06764, K = 2).

    Args:
        attention: (R, N) attention of R words in the second decoder layer, mean over the heads.
        budget: tokens to keep, at least 1; N or more keeps all.

    Returns:
        (min(budget, N),) int64, ascending. Equal attention keeps the lower index.

    """
    check_count("budget", budget)
    check_tensor("attention", attention, ("R", "N"), like=attention)
    return _highest(attention[-1], budget)


def sparsevlm_boundary(
    attention: Tensor, image_features: Tensor, text_embeds: Tensor, budget: int
) -> Tensor:
    """The tokens with the most attention from the words that resemble the image most.

    arXiv 2410.04417: visual tokens spread a weight of one each over the words by a softmax of their
    dot products; words with more than the mean weight are raters. The score of a token is the mean
    attention of the raters. The paper reads it after its third layer, here it is the second's.

    Args:
        attention: (R, N) attention of R >= L words, mean over the heads; the first L are those of
            the question.
        image_features: (N, D) projected into the language model's space, any float dtype.
        text_embeds: (L, D) raw token embeddings of the question, L >= 1.
        budget: tokens to keep, at least 1; N or more keeps all.

    Returns:
        (min(budget, N),) int64, ascending. Equal scores keep the lower index.

    """
    check_count("budget", budget)
    check_tensor("attention", attention, ("R", "N"), like=attention)
    width = image_features.shape[1]
    check_tensor("text_embeds", text_embeds, ("L", width), like=image_features)
    logits = image_features.float() @ text_embeds.float().mT
    share = logits.nan_to_num(0.0, 0.0, 0.0).softmax(dim=1).mean(dim=0)
    # A single word, or words of equal weight, are all raters.
    is_rater = share > share.mean()
    is_rater |= ~is_rater.any()
    words = attention[: len(text_embeds)]
    return _highest(torch.where(is_rater[:, None], words, 0.0).sum(dim=0), budget)


def _highest(scores: Tensor, budget: int) -> Tensor:
    return torch.sort(rank(scores.float().nan_to_num(0.0, 0.0, 0.0))[:budget]).values
