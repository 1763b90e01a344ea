# SPDX-License-Identifier: Apache-2.0
"""PruMerge+ (LLaVA-PruMerge, arXiv 2403.15388): salient and evenly spaced tokens, others merged in.

In the paper the number of tokens adapts to each image. Published results at a fixed number use the
released code's fixed ratio: as many salient as evenly spaced tokens, and one token for all dropped
ones, so 65, 129 or 193 for ratios of 1/18, 1/9 and 1/6 of 576. This file implements that variant.

Written from the description of the method. Deviations and choices of our own:

* **Exact count.** An odd budget ``2k + 1`` is the published ``k + k + 1``. An even budget ``2k``
  has **no token for the dropped ones**; 64 is 32 + 32. A budget of 1 is that token alone.
* **No duplicates.** The evenly spaced tokens are taken from those that are not salient, in the
  middle of equal intervals. The published fixed-ratio code spaces them over all tokens, so some are
  kept twice and others are not counted as dropped.
* A budget for all tokens returns all of them, in order and unmerged.
* Patches with a non-finite feature or attention add nothing to a sum, so the result is finite.
* Equal attention and equal similarity resolve to the lower index.
* **Long lists**, of more than 4,096 tokens, are distributed over blocks, and the neighbours of each
  kept token are searched in one of them.

The published attention and keys are those of the last layer, not split into heads, while the
features come from the last layer but one. The published models were fine-tuned with the method;
without fine-tuning, as here, it is known to be less accurate.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from flashvlm_vllm.selection.arguments import check_count, check_tensor
from flashvlm_vllm.selection.baselines.merging import (
    cosines,
    rank_by_attention,
    rows_at_once,
    summable,
)
from flashvlm_vllm.selection.baselines.sampling import uniform
from flashvlm_vllm.selection.long_lists import MOST_PAIRED

# Number of other tokens that are merged into each kept token. Published value.
NEIGHBOURS: Final = 32


def prumerge_plus(tower_features: Tensor, attention: Tensor, keys: Tensor, budget: int) -> Tensor:
    """Features for the projector instead of those of all patches.

    1. Keep the k patches with the most attention and k evenly spaced among the others.
    2. Add to each the 32 patches, kept or not, with the most similar keys, each times its
       attention. The attention is not normalised, so these sums are small next to the token.
    3. For an odd budget, one more token: the sum of all dropped patches times their attention.

    Args:
        tower_features: (N, C) patches before the projector, any float dtype.
        attention: (N,) softmax weights that the patches get from CLS; their scale counts.
        keys: (N, K) compared by cosine.
        budget: tokens to return, at least 1; N or more returns all tokens unchanged.

    Returns:
        (min(budget, N), C): the salient tokens by descending attention, then the evenly spaced ones
        in raster order, then the token for the dropped ones; dtype and device of `tower_features`.
        Sums are float32.

    Raises:
        TypeError: the budget is not an int or a tensor is not floating point.
        ValueError: the budget is below 1, or shapes or devices do not match.
    """
    check_count("budget", budget)
    check_tensor("tower_features", tower_features, ("N", "C"), like=tower_features)
    count = tower_features.shape[0]
    check_tensor("attention", attention, (count,), like=tower_features)
    check_tensor("keys", keys, (count, "K"), like=tower_features)
    with torch.no_grad():
        if budget >= count:
            return tower_features.clone()
        features, _ = summable(tower_features)
        attention = attention.float()
        kept = salient_and_spaced(attention, budget // 2)

        attention = torch.where(torch.isfinite(attention), attention, 0.0)
        merged = features.index_select(0, kept)
        blocks = -(-count // MOST_PAIRED)
        for block in range(blocks):
            # In a list too long to compare all pairs, each kept token is compared with one block.
            mine = torch.arange(len(kept), device=kept.device)[block::blocks]
            seen = torch.arange(count, device=kept.device)[block::blocks]
            own_keys, own_attention, own_features = keys[seen], attention[seen], features[seen]
            for rows in mine.split(rows_at_once(len(seen))):
                weights = neighbour_weights(
                    keys[kept[rows]], kept[rows], own_keys, seen, own_attention
                )
                merged[rows] += weights @ own_features
        if budget % 2 == 1:
            dropped = attention.index_fill(0, kept, 0.0)
            merged = torch.cat([merged, dropped[None] @ features])
        return merged.to(tower_features.dtype)


def prumerge_anchors(attention: Tensor, budget: int) -> Tensor:
    """Return the patch whose position each token of `prumerge_plus` gets.

    The token for the dropped ones gets the position of the last of them.

    Args:
        attention: (N,) as for `prumerge_plus`.
        budget: 1 to N - 1.

    Returns:
        (budget,) int64, distinct, in the order of `prumerge_plus`'s tokens.
    """
    kept = salient_and_spaced(attention.float(), budget // 2)
    if budget % 2 == 0:
        return kept
    numbers = torch.arange(len(attention), device=attention.device)
    last = numbers.index_fill(0, kept, -1).argmax()
    return torch.cat([kept, last[None]])


def salient_and_spaced(attention: Tensor, each: int) -> Tensor:
    """Step 1.

    Args:
        attention: (N,) float32.
        each: number of salient and number of evenly spaced tokens, 0 to N / 2.

    Returns:
        (2 * each,) int64, distinct: by descending attention, then ascending.
    """
    ranking = rank_by_attention(attention)
    if each == 0:
        return ranking[:0]
    others = torch.sort(ranking[each:]).values
    spaced = uniform(others.shape[0], each).to(others.device)
    return torch.cat([ranking[:each], others.index_select(0, spaced)])


def neighbour_weights(
    kept_keys: Tensor, kept: Tensor, keys: Tensor, tokens: Tensor, attention: Tensor
) -> Tensor:
    """Step 2 as a matrix: the weight of every token in each kept token.

    Args:
        kept_keys: (T, K), any float dtype.
        kept: (T,) token indices of `kept_keys`.
        keys: (N, K).
        tokens: (N,) token indices of `keys`.
        attention: (N,) float32, finite.

    Returns:
        (T, N) float32: the attention at the `NEIGHBOURS` most similar other tokens, else 0.
    """
    similarity = cosines(kept_keys, keys)
    # No token is its own neighbour.
    similarity.masked_fill_(kept[:, None] == tokens, -torch.inf)
    count = min(NEIGHBOURS, keys.shape[0] - 1)
    # Which of several equal entries `topk` returns is undefined, but the last value is defined.
    last = torch.topk(similarity, count, dim=1).values[:, -1:]
    is_nearer, is_last = similarity > last, similarity == last
    room = count - is_nearer.sum(dim=1, keepdim=True, dtype=torch.int32)
    is_last &= is_last.cumsum(dim=1, dtype=torch.int32) <= room
    return torch.where(is_nearer | is_last, attention, 0.0)
