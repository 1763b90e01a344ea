# SPDX-License-Identifier: Apache-2.0
"""Converts the selection of one item into a record that can be sent to an API process."""

from collections.abc import Mapping

import torch
from torch import Tensor

from flashvlm_vllm.ipc.explain_request import Coverage, ItemRecord, PartRecord
from flashvlm_vllm.selection import Selection
from flashvlm_vllm.selection.flashvlm_2 import LEAST
from flashvlm_vllm.selection.llm_attention import attended_scores
from flashvlm_vllm.selection.neighbours import places_in_time
from flashvlm_vllm.selection.scaling import min_max
from flashvlm_vllm.selection.score_maps import ScoreMaps, coverage, score_maps
from flashvlm_vllm.worker.candidates import Candidates

_DIGITS = 4


def record_of(parts: Mapping[int, tuple[Candidates, Selection]], text: Tensor | None) -> ItemRecord:
    """Return scores of an item's tokens, which tokens are kept, and how well they cover the rest.

    Args:
        parts: candidates and selection of each part, by part number.
        text: ``(L, D)`` embeddings of the question, even if the selector does not use it.

    """
    every = torch.cat([each.part.features for each, _ in parts.values()])
    is_merged = any(chosen.merged is not None for _, chosen in parts.values())
    kept = [_is_kept(each, chosen) for each, chosen in parts.values()]
    if is_merged:
        stays = torch.cat([_representatives(each, chosen) for each, chosen in parts.values()])
        covered = coverage(every, stays)
    else:
        mask = torch.cat(kept)
        covered = coverage(every[~mask], every[mask])
    return ItemRecord(
        is_merged,
        None if covered is None else Coverage(covered.largest, covered.mean),
        [
            _part(number, each, mask, text)
            for (number, (each, _)), mask in zip(parts.items(), kept, strict=True)
        ],
    )


def _part(number: int, candidates: Candidates, kept: Tensor, text: Tensor | None) -> PartRecord:
    part = candidates.part
    maps = score_maps(part.projected, part.saliency, text)
    if candidates.attention is not None and candidates.attention.words:
        # A selector that uses the language model: its relevance replaces that of the words.
        places = places_in_time(part.places, candidates.times)
        read = min_max(attended_scores(candidates.attention.read, places), LEAST)
        maps = ScoreMaps(maps.saliency, read, read)
    return PartRecord(
        number,
        part.frames,
        part.places.tolist(),
        kept.tolist(),
        _rounded(maps.saliency),
        None if maps.relevance is None else _rounded(maps.relevance),
        _rounded(maps.fused),
    )


def _is_kept(candidates: Candidates, chosen: Selection) -> Tensor:
    """Return ``(N,)`` bool. All are False if tokens were merged."""
    mask = torch.zeros(candidates.total, dtype=torch.bool, device=candidates.part.features.device)
    if chosen.indices is not None:
        mask[chosen.indices] = True
    return mask


def _representatives(candidates: Candidates, chosen: Selection) -> Tensor:
    if chosen.merged is not None:
        return chosen.merged
    rows: Tensor = candidates.part.features[chosen.indices]
    return rows


def _rounded(values: Tensor) -> list[float]:
    return [round(value, _DIGITS) for value in values.tolist()]
