# SPDX-License-Identifier: Apache-2.0
"""`flashvlm-2`: what FlashVLM's selection became by measuring what it misses. No paper has it.

The evidence, on a model and scenes of this repository, is in ``benchmarks/accuracy/README.md``.
What differs from FlashVLM, and why:

* **Words are standardised over the image.** A function word is about as near to every patch, and
  by that wins eq 5's softmax over raw cosines. Here a word counts for a patch by how much nearer
  it is than to the rest of the image.
* **A sum replaces sharpening and the geometric mean.** Sharpening and the gate leave a handful of
  patches above a floor and so most of the ranking to the saliency. Here both terms keep their
  whole scale.
* **Neighbours share their scores.** What is asked for covers several adjacent patches, each of
  which is noisy: a score is the mean over the 3 x 3 patches around.
* **One choice in place of two halves.** Important tokens crowd on one object; the diverse half
  spends tokens on the ground. The determinant (CDPruner's, with this score as its weight) takes
  the next token that is both worth keeping and unlike the kept ones.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from flashvlm_vllm.selection.arguments import check_count, check_tensor
from flashvlm_vllm.selection.determinant import largest_determinant_of_any
from flashvlm_vllm.selection.relevance import text_similarity
from flashvlm_vllm.selection.scaling import unit_rows

RELEVANCE_WEIGHT: Final = 3.0
"""Of the words, beside the saliency's 1. Of 2, 3 and 4 the best on 1,200 development questions,
by 0.4 points."""
REACH: Final = 1
"""How many patches away still is near."""
LEAST: Final = 1e-6
"""Under logarithms and deviations."""
HIGHEST: Final = 8.0
"""Standard deviations at which a score stops to count for more: exp(8)^2 is far from overflow."""


def select_coherent(
    image_features: Tensor,
    saliency: Tensor,
    text_embeds: Tensor | None,
    budget: int,
    diversity_features: Tensor,
    places: Tensor,
) -> Tensor:
    """Indices of the visual tokens to keep for one image, or one crop of it.

    Args:
        image_features: (N, D) projected into the language model's space, N >= 1.
        saliency: (N,) attention received, not normalised.
        text_embeds: (L, D) raw token embeddings of the question; None or L == 0: saliency only.
        budget: tokens to keep, at least 1; N or more keeps all.
        diversity_features: (N, C) compared with one another; for LLaVA those before the projector.
        places: (N, 2) int64 row and column of each token.

    Returns:
        (min(budget, N),) int64, ascending, on the device of `image_features`. Equal gains keep
        the lower index.

    Raises:
        TypeError: the budget is no int (a bool is refused too) or a tensor is not floating point.
        ValueError: the budget is below 1, or shapes or devices do not fit together.

    """
    check_count("budget", budget)
    check_tensor("image_features", image_features, ("N", "D"), like=image_features)
    count, width = image_features.shape
    check_tensor("saliency", saliency, (count,), like=image_features)
    if text_embeds is not None:
        check_tensor("text_embeds", text_embeds, ("L", width), like=image_features, least=0)
    check_tensor("diversity_features", diversity_features, (count, "C"), like=image_features)
    if tuple(places.shape) != (count, 2):
        raise ValueError(f"places is {tuple(places.shape)}; allowed: ({count}, 2)")
    if budget >= count:
        return torch.arange(count, device=image_features.device)
    with torch.no_grad():
        scores = coherent_scores(image_features, saliency, text_embeds, places)
        weight = standardised(scores).clamp(-HIGHEST, HIGHEST).exp()
        kept = largest_determinant_of_any(diversity_features, weight, budget)
        return torch.sort(kept).values


def coherent_scores(
    image_features: Tensor, saliency: Tensor, text_embeds: Tensor | None, places: Tensor
) -> Tensor:
    """Log saliency plus nearness to a word, both standardised, averaged over the neighbours.

    Args:
        image_features: (N, D) projected into the language model's space, any float dtype.
        saliency: (N,) attention received, not normalised.
        text_embeds: (L, D) raw token embeddings of the question; None or L == 0: saliency only.
        places: (N, 2) int64 row and column of each token.

    Returns:
        (N,) float32, finite. A broken token scores low, a broken word says nothing.

    """
    seen = saliency.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    score = standardised(seen.clamp_min(LEAST).log())
    if text_embeds is not None and len(text_embeds):
        by_word = standardised(text_similarity(image_features, unit_rows(text_embeds)))
        is_broken = ~text_embeds.isfinite().all(dim=1)
        nearest = by_word.masked_fill(is_broken, -torch.inf).amax(dim=1)
        # Not one word is left where all are broken.
        score = score + RELEVANCE_WEIGHT * standardised(nearest.nan_to_num(neginf=0.0))
    return mean_of_near(score, places)


def standardised(values: Tensor) -> Tensor:
    """Shift and scale along the first dimension to mean 0 and deviation 1; constants become 0.

    Args:
        values: (N,) or (N, L), float32, finite, N >= 1.

    """
    centred = values - values.mean(dim=0)
    return centred / (centred.square().mean(dim=0).sqrt() + LEAST)


def mean_of_near(values: Tensor, places: Tensor) -> Tensor:
    """Average each value with those at most `REACH` rows and columns away.

    Neighbours are looked up in the sorted places: no grid has to be known, places may be missing
    (padding), and nothing is read back from the device. O(N log N) time, O(N) memory.

    Args:
        values: (N,) float32.
        places: (N, 2) int64, distinct, 0 or more.

    """
    rows, columns = places.unbind(dim=1)
    # Far enough apart that the end of a row is not near the start of the next.
    stride = columns.max() + 1 + REACH
    numbers = rows * stride + columns
    ascending, order = torch.sort(numbers)
    total, count = torch.zeros_like(values), torch.zeros_like(values)
    for down in range(-REACH, REACH + 1):
        for across in range(-REACH, REACH + 1):
            wanted = numbers + down * stride + across
            found = torch.searchsorted(ascending, wanted).clamp_max(len(order) - 1)
            is_there = ascending[found] == wanted
            total += torch.where(is_there, values[order[found]], 0.0)
            count += is_there
    return total / count
