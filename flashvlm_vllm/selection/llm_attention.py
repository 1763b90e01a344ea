# SPDX-License-Identifier: Apache-2.0
"""`llm-attention`: keeps what the words of a prompt attend to in the second decoder layer.

It is this project's own and not published. The measurements it was developed on, with every variant
that was tried, are in ``benchmarks/language_attention/README.md``. How it differs from selectors
that read attention in the language model (FastV, SparseVLM):

* **Attention times the length of the value vector**, not attention alone. Tokens that collect
  attention without passing anything on have short values.
* **All words up to the answer, the largest of them**: some heads look for the object in question
  from a word that names it, others from the last words of the template.
* **Averaged over adjacent tokens**, because an object covers several of them.
* **The highest scores where a head has found something.** A question about one object has a head
  that reads mostly one token. Then the tokens with the highest scores are kept.
* **Otherwise a determinant.** Where the words name nothing in the image ("describe the picture"),
  no head does, and the highest scores would leave most objects out. Scores are weights then, and
  the determinant spreads the kept tokens.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from flashvlm_vllm.selection.arguments import check_count, check_tensor
from flashvlm_vllm.selection.determinant import largest_determinant_of_any
from flashvlm_vllm.selection.neighbours import mean_of_near
from flashvlm_vllm.selection.partition import rank

AVERAGED: Final = 4
"""How often scores are averaged over neighbours: a Gaussian with a deviation of 1.6 tokens. The
best of 1, 2, 3, 4, 6 and 8 on 1,000 development questions."""
FOUND: Final = 0.35
"""Share of what one head reads for one word, from which its largest token decides: the highest
scores are kept. Measured on questions and descriptions of two models."""
POWER: Final = 2.0
"""Exponent of the scores as weights in the determinant. With 3 questions are answered equally well
and descriptions worse; with 1 the opposite."""
LEAST: Final = 1e-6
"""Lower bound of a weight relative to the mean, for the determinant."""


def select_attended(
    weighted_attention: Tensor,
    largest_share: Tensor,
    budget: int,
    diversity_features: Tensor,
    places: Tensor,
) -> Tensor:
    """Indices of the visual tokens to keep for one image, or one crop of it.

    Args:
        weighted_attention: (R, N) attention of R words to each token times the length of the
            token's value vector, the largest over the heads; R >= 1.
        largest_share: (R,) share of the largest token in what one head reads, the largest over the
            heads. NaN counts as 0.
        budget: tokens to keep, at least 1; N or more keeps all.
        diversity_features: (N, C) compared with one another; for LLaVA those before the projector.
        places: (N, 2) int64 row and column of each token.

    Returns:
        (min(budget, N),) int64, ascending. Equal gains keep the lower index.

    Raises:
        TypeError: the budget is not an int (a bool is refused too) or a tensor is not floating
            point.
        ValueError: the budget is below 1, or shapes do not match.

    """
    check_count("budget", budget)
    check_tensor("weighted_attention", weighted_attention, ("R", "N"), like=weighted_attention)
    count = weighted_attention.shape[1]
    rows = weighted_attention.shape[0]
    check_tensor("largest_share", largest_share, (rows,), like=weighted_attention)
    check_tensor("diversity_features", diversity_features, (count, "C"), like=weighted_attention)
    if tuple(places.shape) != (count, 2):
        raise ValueError(f"places is {tuple(places.shape)}; allowed: ({count}, 2)")
    if budget >= count:
        return torch.arange(count, device=weighted_attention.device)
    with torch.no_grad():
        scores = attended_scores(weighted_attention, places)
        weight = (scores / scores.mean().clamp_min(torch.finfo(torch.float32).tiny)).pow(POWER)
        different = largest_determinant_of_any(diversity_features, weight.clamp_min(LEAST), budget)
        # Both are computed: on a GPU, to ask which is needed would wait for the device.
        has_found = largest_share.nan_to_num(nan=0.0).amax() > FOUND
        kept = torch.where(has_found, rank(scores)[:budget], different)
        return torch.sort(kept).values


def attended_scores(weighted_attention: Tensor, places: Tensor) -> Tensor:
    """Return how much the words read of each token and its neighbours, (N,) float32, finite.

    Args:
        weighted_attention: (R, N), see `select_attended`; what is not finite counts as 0.
        places: (N, 2) int64 row and column of each token.

    """
    finite = weighted_attention.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return mean_of_near(finite.amax(dim=0), places, AVERAGED)
