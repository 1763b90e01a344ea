# SPDX-License-Identifier: Apache-2.0
"""CDPruner (arXiv 2506.10967, NeurIPS 2025): diverse tokens, weighted by the question.

The kept set greedily maximises the determinant of the kernel of a determinantal point process,
``L = diag(q) S diag(q)``, where `S` are the cosines between the visual tokens and `q` is their
relevance. Written from the description of the method. Deviations and choices of our own:

* **Text.** The published LLaVA version compares in CLIP's joint space, but a served model does not
  include CLIP's text tower. By default the question's input embeddings of the language model are
  used instead, and compared with the projected tokens. With `relevance_features` in CLIP's space
  and CLIP's text vectors as `text_embeds` it is the published comparison.
* **Sign.** The published code uses the *negative* cosine; its authors say that this is needed with
  CLIP only. So here the more similar token is the more relevant one, and ``negated`` gives the
  published sign, for use with CLIP.
* **Range.** Relevance is rescaled over the given tokens; published, over all crops of an image.
  The published divisor is the range itself, so equal relevances divide by zero; here they become
  equal weights, so that only diversity counts.
* **No question**: only diversity counts; the published code always has a question.
* **Lower bound.** The determinant of `L` is that of `S` times all ``q^2``. So only `S`, with ones
  on its diagonal, is factorised, and `q` is used where candidates are compared. The choices are the
  same as with `L`, whose entries may be 1e-12. The part of a token outside the span of the kept
  tokens is at least `NO_NEWS`, and a token at that bound does not change the others. When the kept
  tokens span all directions, the rest are chosen by relevance. The published code has no such
  bound, and can give NaN there.
* A token whose vector is zero or not finite adds no direction and counts as the least relevant. A
  word with such a vector is ignored.
* The result is in raster order; equal gains keep the lower index.
* **Long lists**, of more than 4,096 tokens, are selected from in two rounds of blocks
  (`long_lists`).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from flashvlm_vllm.selection.arguments import check_count, check_tensor
from flashvlm_vllm.selection.determinant import largest_determinant_of_any
from flashvlm_vllm.selection.scaling import min_max, unit_rows

# Added to the relevance, so that every token can be chosen. Published value.
LEAST_RELEVANCE: Final = 1e-6


def cdpruner(
    image_features: Tensor,
    text_embeds: Tensor | None,
    budget: int,
    *,
    relevance_features: Tensor | None = None,
    negated: bool = False,
) -> Tensor:
    """Indices of diverse and relevant tokens.

    Up to 4,096 tokens O(N^2 D) for the cosines and O(N T^2) for the rest; linear in N above that.

    Args:
        image_features: (N, D) projected into the language model's space, any float dtype.
        text_embeds: (L, E) vectors of the question; the relevance is the mean of their cosines.
            None or L == 0: diversity alone.
        budget: tokens to keep, at least 1; N or more keeps all.
        relevance_features: (N, E) compared with `text_embeds`; None: `image_features`, so E = D.
        negated: True makes the least similar tokens the most relevant ones.

    Returns:
        (min(budget, N),) int64, ascending, on the device of `image_features`.

    Raises:
        TypeError: the budget is not an int, `negated` not a bool or a tensor not floating point.
        ValueError: the budget is below 1, or shapes or devices do not match.
    """
    check_count("budget", budget)
    if not isinstance(negated, bool):
        raise TypeError(f"negated is {negated!r}; allowed: True or False")
    check_tensor("image_features", image_features, ("N", "D"), like=image_features)
    count = image_features.shape[0]
    compared = image_features
    if relevance_features is not None:
        check_tensor("relevance_features", relevance_features, (count, "E"), like=image_features)
        compared = relevance_features
    if text_embeds is not None:
        width = compared.shape[1]
        check_tensor("text_embeds", text_embeds, ("L", width), like=image_features, least=0)
    if budget >= count:
        return torch.arange(count, device=image_features.device)
    with torch.no_grad():
        if text_embeds is None or text_embeds.shape[0] == 0:
            weight = torch.ones(count, device=image_features.device)
        else:
            weight = question_relevance(compared, text_embeds, negated)
        return torch.sort(largest_determinant_of_any(image_features, weight, budget)).values


def question_relevance(features: Tensor, text_embeds: Tensor, negated: bool) -> Tensor:
    """The mean cosine with the vectors of the question, rescaled.

    Args:
        features: (N, E), any float dtype.
        text_embeds: (L, E), L >= 1, any float dtype.
        negated: whether similar means irrelevant.

    Returns:
        (N,) float32 in [`LEAST_RELEVANCE`, 1 + `LEAST_RELEVANCE`].
    """
    unit = unit_rows(features)
    # A word with a NaN is NaN for every token and is left out of the mean. A token with a NaN is
    # NaN for every word, remains NaN and becomes the lowest in `min_max`, for either sign. A zero
    # vector is handled in the same way.
    relevance = torch.nanmean(unit @ unit_rows(text_embeds).T, dim=1)
    relevance = torch.where(unit.any(dim=1), relevance, torch.nan)
    return min_max(-relevance if negated else relevance, LEAST_RELEVANCE) + LEAST_RELEVANCE
