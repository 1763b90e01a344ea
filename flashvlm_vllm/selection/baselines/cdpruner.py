# SPDX-License-Identifier: Apache-2.0
"""CDPruner (arXiv 2506.10967, NeurIPS 2025): diverse tokens, weighted by the question.

The kept set maximises, greedily, the determinant of a determinantal point process's kernel
``L = diag(q) S diag(q)``: `S` the cosines between the visual tokens, `q` their relevance.

Written from the description of the method. What is decided here:

* **Text.** The published LLaVA version compares in CLIP's joint space, whose text tower a served
  model does not carry. By default the question's input embeddings in the language model stand in
  for it and are compared with the projected tokens. With `relevance_features` in CLIP's space and
  CLIP's text vectors as `text_embeds` it is the published comparison.
* **Sign.** The published code takes the *negative* cosine; its authors say that they saw the need
  for it with CLIP only. So here the more similar token is the more relevant one, and ``negated``
  gives the published sign, for use with CLIP.
* **Range.** Relevance is rescaled over the tokens given; published, over all crops of an image.
  The published divisor is the bare range, so equal relevances divide by zero; here they become
  equal weights, that is, plain diversity.
* **No question** leaves plain diversity too; the published code always has one.
* **Floor.** The determinant of `L` is that of `S` times all ``q^2``. So only `S`, with ones on its
  diagonal, is factorised, and `q` enters where candidates are compared: the same choices as on
  `L`, whose entries may be 1e-12. What is left of a token beyond the kept ones is never taken for
  less than `NO_NEWS`, and a token at that floor changes nothing for the others. Once the kept
  tokens span all directions the rest follow by relevance. Published code has no floor and can
  turn into NaN there.
* A token whose vector is zero or not finite adds no direction and counts as the least relevant. A
  broken word is left out.
* The result is in raster order; equal gains keep the lower index.
* **Long lists**, of more than 4,096 tokens, are chosen from in blocks and then once more
  (`long_lists`).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from flashvlm_vllm.selection.arguments import check_count, check_tensor
from flashvlm_vllm.selection.determinant import largest_determinant_of_any
from flashvlm_vllm.selection.scaling import min_max, unit_rows

# Added to the least relevance, so that no token is impossible. Published value.
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

    Up to 4,096 tokens O(N^2 D) for the cosines and O(N T^2) for the rest, then linear in N.

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
        TypeError: the budget is no int, `negated` no bool or a tensor not floating point.
        ValueError: the budget is below 1, or shapes or devices do not fit together.
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
    # A broken word is NaN for every token and drops out of the mean; a broken token is NaN for
    # every word, stays NaN and becomes the lowest in `min_max`, whatever the sign. A zero vector
    # is made to share its fate.
    relevance = torch.nanmean(unit @ unit_rows(text_embeds).T, dim=1)
    relevance = torch.where(unit.any(dim=1), relevance, torch.nan)
    return min_max(-relevance if negated else relevance, LEAST_RELEVANCE) + LEAST_RELEVANCE
