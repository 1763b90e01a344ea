# SPDX-License-Identifier: Apache-2.0
"""`flashvlm-2`: a variant of FlashVLM's selection, developed on measurements. It is not published.

The measurements, with a model and scenes of this repository, are in
``benchmarks/accuracy/README.md``. Differences from FlashVLM, and the reasons:

* **Words are standardised over the image.** A function word has nearly the same cosine with every
  patch, often a high one, and then dominates eq 5's softmax over raw cosines. Here a word counts
  for a patch by how much more similar they are than the word is to the rest of the image.
* **A sum replaces sharpening and the geometric mean.** Sharpening and the gate leave few patches
  above the lower bound, so saliency determines most of the ranking. Here both terms keep their
  full range.
* **Scores are averaged over neighbours.** The object in question covers several adjacent patches,
  each of which has a noisy score: a score is the mean over the surrounding 3 x 3 patches.
* **One choice in place of two halves.** The important tokens are often all on one object, and many
  of the diverse ones on the background. The determinant (as in CDPruner, with this score as weight)
  chooses the next token by both its score and its difference from the kept tokens.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from flashvlm_vllm.selection.arguments import check_count, check_tensor
from flashvlm_vllm.selection.determinant import largest_determinant_of_any
from flashvlm_vllm.selection.neighbours import mean_of_near
from flashvlm_vllm.selection.relevance import text_similarity
from flashvlm_vllm.selection.scaling import unit_rows

RELEVANCE_WEIGHT: Final = 3.0
"""Weight of the words; that of the saliency is 1. The best of 2, 3 and 4 on 1,200 development
questions, by 0.4 points."""
LEAST: Final = 1e-6
"""Lower bound in logarithms and for standard deviations."""
HIGHEST: Final = 8.0
"""Upper bound of a score in standard deviations: exp(8)^2 is far from overflow."""


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
        TypeError: the budget is not an int (a bool is refused too) or a tensor is not floating
            point.
        ValueError: the budget is below 1, or shapes or devices do not match.

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
    """Log saliency plus similarity to the most similar word, both standardised, over neighbours.

    Args:
        image_features: (N, D) projected into the language model's space, any float dtype.
        saliency: (N,) attention received, not normalised.
        text_embeds: (L, D) raw token embeddings of the question; None or L == 0: saliency only.
        places: (N, 2) int64 row and column of each token.

    Returns:
        (N,) float32, finite. A token with a NaN or an infinity scores low; such a word is ignored.

    """
    seen = saliency.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    score = standardised(seen.clamp_min(LEAST).log())
    if text_embeds is not None and len(text_embeds):
        by_word = standardised(text_similarity(image_features, unit_rows(text_embeds)))
        is_broken = ~text_embeds.isfinite().all(dim=1)
        nearest = by_word.masked_fill(is_broken, -torch.inf).amax(dim=1)
        # If all words have a NaN or an infinity, none is left.
        score = score + RELEVANCE_WEIGHT * standardised(nearest.nan_to_num(neginf=0.0))
    return mean_of_near(score, places)


def standardised(values: Tensor) -> Tensor:
    """Shift and scale along the first dimension to mean 0 and deviation 1; constants become 0.

    Args:
        values: (N,) or (N, L), float32, finite, N >= 1.

    """
    centred = values - values.mean(dim=0)
    return centred / (centred.square().mean(dim=0).sqrt() + LEAST)
