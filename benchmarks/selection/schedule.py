# SPDX-License-Identifier: Apache-2.0
"""Tokens kept by the geometric schedule, compared with the published one."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from benchmarks.selection.clock import DEVICE
from benchmarks.selection.methods import METHODS
from benchmarks.selection.synthetic import Image, synthetic_video
from flashvlm_vllm.selection.baselines import random_tokens
from flashvlm_vllm.selection.scaling import unit_rows

COUNTS: Final = (576, 1024, 2048)
SHARE: Final = 0.11
WIDTH: Final = 1024
SEEDS: Final = 5


@dataclass(frozen=True)
class Kept:
    """Means over some videos. Distances are 1 - cosine of a dropped token to the nearest kept."""

    tokens: int
    way: str
    shared_with_fixed: float
    """Share of the kept tokens that the fixed schedule keeps too."""
    diverse_shared: float
    """The same of the diversity reserve alone, counted from the half that is not."""
    mean_distance: float
    largest_distance: float


def _random(image: Image, budget: int) -> Tensor:
    return random_tokens(len(image.features), budget, seed=0).to(image.features.device)


WAYS: Final[dict[str, Callable[[Image, int], Tensor]]] = {
    "fixed": METHODS["flashvlm"].choose,
    "geometric": METHODS["flashvlm, video"].choose,
    "at random": _random,
}


def measure_schedules() -> list[Kept]:
    """Both schedules, and chance, at sizes where the fixed one is quick."""
    results = []
    for count in COUNTS:
        budget = round(SHARE * count)
        important = budget // 2
        rows: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
        for seed in range(SEEDS):
            video = synthetic_video(count, WIDTH, seed).to(DEVICE)
            fixed = WAYS["fixed"](video, budget)
            for way, choose in WAYS.items():
                kept = choose(video, budget)
                shared = int(torch.isin(kept, fixed).sum())
                rows[way].append((float(shared), *distances(video.diversity, kept)))
        for way, measured in rows.items():
            shared, mean, largest = map(statistics.mean, zip(*measured, strict=True))
            diverse = max(0.0, shared - important) / (budget - important)
            results.append(Kept(count, way, shared / budget, diverse, mean, largest))
    return results


def distances(features: Tensor, kept: Tensor) -> tuple[float, float]:
    """Mean and largest distance of the dropped tokens to their nearest kept one."""
    unit = unit_rows(features)
    is_dropped = torch.ones(len(unit), dtype=torch.bool, device=unit.device)
    is_dropped[kept] = False
    distance = 1 - (unit[is_dropped] @ unit[kept].T).amax(dim=1)
    return float(distance.mean()), float(distance.max())
