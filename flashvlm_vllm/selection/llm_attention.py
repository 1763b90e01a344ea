# SPDX-License-Identifier: Apache-2.0
"""`llm-attention`: keeps what the words of a prompt attend to in the language model's first layers.

It is this project's own and not published. The measurements it was developed on, with every variant
that was tried, are in ``benchmarks/language_attention/README.md``. How it differs from selectors
that read attention in the language model (FastV, SparseVLM):

* **The second and the third layer.** Which of them finds the object depends on the model and on the
  question.
* **Attention times the length of the value vector**, not attention alone. Tokens that collect
  attention without passing anything on have short values.
* **Times the ratio to the head's mean over the words.** A head that reads the same tokens for all
  words has not looked for anything.
* **All words up to the answer, the largest of them**: the object is found from a word that names
  it, or from the last words of the template.
* **Squared before it is added up and averaged over adjacent tokens.** A layer that has found
  something reads much of few tokens; one that has not reads a little of many.
* **A determinant instead of the highest scores.** Powers of the scores are weights, and the
  determinant spreads the kept tokens: over an object in question without its repetitions, and over
  the picture where the words name nothing in it ("describe the picture").
* **Half of the visual tokens pass the first layer**, a checkerboard: averaging over adjacent tokens
  gives the others a score, too. All give the first layer keys and values.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from flashvlm_vllm.selection.arguments import check_count, check_tensor
from flashvlm_vllm.selection.determinant import largest_determinant_of_any
from flashvlm_vllm.selection.neighbours import mean_of_near

AVERAGED: Final = 4
"""How often scores are averaged over neighbours: a Gaussian with a deviation of 1.6 tokens. This
also gives scores to the tokens between those that were read."""
SHARPNESS: Final = 2.0
"""Exponent of what the words read of a token, relative to the mean of the layer."""
WEIGHT_POWER: Final = 1.5
"""Exponent of a score, relative to the mean, as weight in the determinant."""
LEAST: Final = 1e-6
"""Lower bound of a weight relative to the mean, for the determinant."""


def select_attended(
    read: Tensor, budget: int, diversity_features: Tensor, places: Tensor
) -> Tensor:
    """Indices of the visual tokens to keep for one image, or one crop of it.

    Args:
        read: (L, R, N) what R words read of each token in L layers, see `LanguageAttention`; L and
            R >= 1.
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
    check_tensor("read", read, ("L", "R", "N"), like=read)
    count = read.shape[2]
    check_tensor("diversity_features", diversity_features, (count, "C"), like=read)
    if tuple(places.shape) != (count, 2):
        raise ValueError(f"places is {tuple(places.shape)}; allowed: ({count}, 2)")
    if budget >= count:
        return torch.arange(count, device=read.device)
    with torch.no_grad():
        scores = attended_scores(read, places)
        weight = _relative(scores).pow(WEIGHT_POWER).clamp_min(LEAST)
        return torch.sort(largest_determinant_of_any(diversity_features, weight, budget)).values


def attended_scores(read: Tensor, places: Tensor) -> Tensor:
    """Return how much the words read of each token and its neighbours, (N,) float32, finite.

    Args:
        read: (L, R, N), see `select_attended`; what is not finite counts as 0.
        places: (N, 2) int64 row and column of each token.

    """
    finite = read.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0.0)
    found = _relative(finite.amax(dim=1)).pow(SHARPNESS).sum(dim=0)
    return mean_of_near(found, places, AVERAGED)


def _relative(values: Tensor) -> Tensor:
    """Divide (..., N) values, 0 or more, by their mean."""
    mean = values.mean(dim=-1, keepdim=True)
    return values / mean.clamp_min(torch.finfo(torch.float32).tiny)
