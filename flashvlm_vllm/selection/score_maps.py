# SPDX-License-Identifier: Apache-2.0
"""The scores of a selection, and how well kept tokens cover the others. Used for explanations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from flashvlm_vllm.selection.config import SelectionConfig
from flashvlm_vllm.selection.relevance import query_relevance
from flashvlm_vllm.selection.saliency import intrinsic_saliency
from flashvlm_vllm.selection.scaling import unit_rows
from flashvlm_vllm.selection.scores import score

_PAIRS_AT_ONCE: Final = 2**22
"""Distances that `coverage` computes at a time: 16 MiB of float32."""


@dataclass(frozen=True, slots=True)
class ScoreMaps:
    """FlashVLM's three scores of every visual token, each in [0, 1]."""

    saliency: Tensor
    """(N,) float32, eq 1."""
    relevance: Tensor | None
    """(N,) float32, eq 2 to 6; None without a question."""
    fused: Tensor
    """(N,) float32, eq 7; without a question the saliency."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """Cosine distances, in [0, 2], of tokens to their nearest representative."""

    largest: float
    """The delta of the paper's delta-cover (sections 6.4 and 7.2)."""
    mean: float


def score_maps(
    image_features: Tensor,
    saliency: Tensor,
    text_embeds: Tensor | None,
    config: SelectionConfig | None = None,
) -> ScoreMaps:
    """Score as the selection does, and return the intermediate scores.

    Args:
        image_features: (N, D) projected into the language model's space, any float dtype.
        saliency: (N,) attention received, not normalised.
        text_embeds: (L, D) raw token embeddings; None or L == 0: no question.
        config: the constants of the method; None: the published ones.
    """
    config = config or SelectionConfig()
    has_question = text_embeds is not None and len(text_embeds) > 0
    return ScoreMaps(
        intrinsic_saliency(saliency, config.epsilon),
        query_relevance(image_features, text_embeds, config)
        if text_embeds is not None and has_question
        else None,
        score(image_features, saliency, text_embeds, config),
    )


def coverage(tokens: Tensor, representatives: Tensor) -> Coverage | None:
    """Measure the distances of tokens to their nearest representatives.

    Distances are computed in blocks, so that memory does not grow with all pairs of a long video. A
    vector with a NaN or an infinity has the largest distance to all others.

    Args:
        tokens: (M, C) tower features of the dropped tokens, any float dtype.
        representatives: (K, C) features of the kept tokens, K >= 1.

    Returns:
        None if no tokens were dropped.
    """
    if not len(tokens):
        return None
    kept = unit_rows(representatives)
    rows = max(1, _PAIRS_AT_ONCE // len(kept))
    distances = []
    for block in tokens.split(rows):
        cosines = (unit_rows(block) @ kept.mT).nan_to_num(nan=-1.0, posinf=-1.0, neginf=-1.0)
        distances.append((1.0 - cosines.amax(dim=1)).clamp(0.0, 2.0))
    nearest = torch.cat(distances)
    return Coverage(nearest.max().item(), nearest.mean().item())
