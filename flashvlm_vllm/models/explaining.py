# SPDX-License-Identifier: Apache-2.0
"""Puts one item's selection into numbers that can be sent to an API process."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashvlm_vllm.selection import Selection
from flashvlm_vllm.selection.maps import coverage, score_maps

if TYPE_CHECKING:
    from flashvlm_vllm.models.pruning import Candidates

_DIGITS = 4


def explained(
    parts: Mapping[int, tuple["Candidates", Selection]], text: Tensor | None
) -> dict[str, Any]:
    """Return the scores of an item's tokens, which stayed, and how well they cover the others.

    Args:
        parts: by number, what was chosen of each crop, or of the whole item.
        text: ``(L, D)`` of the question, also where the selector was not shown it.

    Returns:
        plain lists and numbers: ``merged``, ``coverage``, and ``parts``, each with the number of
        its ``part``, its ``frames``, and of every token its place, its three scores and whether
        it is kept.

    """
    every = torch.cat([each.features for each, _ in parts.values()])
    is_merged = any(chosen.merged is not None for _, chosen in parts.values())
    kept = [_is_kept(each, chosen) for each, chosen in parts.values()]
    if is_merged:
        stays = torch.cat([_representatives(each, chosen) for each, chosen in parts.values()])
        covered = coverage(every, stays)
    else:
        mask = torch.cat(kept)
        covered = coverage(every[~mask], every[mask])
    return {
        "merged": is_merged,
        "coverage": None if covered is None else {"max": covered.largest, "mean": covered.mean},
        "parts": [
            _part(number, each, mask, text)
            for (number, (each, _)), mask in zip(parts.items(), kept, strict=True)
        ],
    }


def _part(number: int, candidates: "Candidates", kept: Tensor, text: Tensor | None) -> Any:
    maps = score_maps(candidates.projected, candidates.saliency, text)
    return {
        "part": number,
        "frames": candidates.frames,
        "places": candidates.places.tolist(),
        "kept": kept.tolist(),
        "saliency": _rounded(maps.saliency),
        "relevance": None if maps.relevance is None else _rounded(maps.relevance),
        "fused": _rounded(maps.fused),
    }


def _is_kept(candidates: "Candidates", chosen: Selection) -> Tensor:
    """Return ``(N,)`` bool; a merged token is none of the picture's."""
    mask = torch.zeros(
        len(candidates.features), dtype=torch.bool, device=candidates.features.device
    )
    if chosen.indices is not None:
        mask[chosen.indices] = True
    return mask


def _representatives(candidates: "Candidates", chosen: Selection) -> Tensor:
    if chosen.merged is not None:
        return chosen.merged
    return candidates.features[chosen.indices]


def _rounded(values: Tensor) -> Sequence[float]:
    return [round(value, _DIGITS) for value in values.tolist()]
