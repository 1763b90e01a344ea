# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared by size, each as a call on one image or video."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Final

from torch import Tensor
from vllm.multimodal.video_prune import evs, vidcom2

from benchmarks.selection.published_loop import published_partition
from benchmarks.selection.synthetic import Image, frames_of
from flashvlm_vllm.selection import (
    VIDEO,
    fused_scores,
    select_visual_tokens,
    select_visual_tokens_ragged,
)
from flashvlm_vllm.selection.baselines import cdpruner, vispruner


@dataclass(frozen=True)
class Method:
    """A way to choose tokens."""

    choose: Callable[[Image, int], Tensor]
    growth: int
    """Exponent by which its time is expected to grow; decides which cells are not tried."""
    all_pairs: bool = False
    """Whether it holds the similarities of all pairs of tokens."""


def select_all(images: Sequence[Image], budget: int) -> list[Tensor]:
    """All images in one call."""
    return select_visual_tokens_ragged(
        [image.features for image in images],
        [image.saliency for image in images],
        [image.text for image in images],
        [budget] * len(images),
        [image.diversity for image in images],
    )


def _flashvlm(image: Image, budget: int) -> Tensor:
    return select_visual_tokens(image.features, image.saliency, image.text, budget, image.diversity)


def _video(image: Image, budget: int) -> Tensor:
    return select_visual_tokens(
        image.features, image.saliency, image.text, budget, image.diversity, VIDEO
    )


def _published(image: Image, budget: int) -> Tensor:
    scores = fused_scores(image.features, image.saliency, image.text)
    return published_partition(scores, image.diversity, budget)


def _vispruner(image: Image, budget: int) -> Tensor:
    return vispruner(image.saliency, image.diversity, budget)


def _cdpruner(image: Image, budget: int) -> Tensor:
    return cdpruner(image.features, image.text, budget)


def _of_vllm(module: ModuleType) -> Callable[[Image, int], Tensor]:
    def choose(image: Image, budget: int) -> Tensor:
        count = len(image.features)
        frames, side = frames_of(count)
        share = 1 - budget / count
        mask: Tensor = module.compute_retention_mask(
            image.features, (frames, side, side), spatial_merge_size=1, q=share
        )
        return mask

    return choose


METHODS: Final = {
    "flashvlm": Method(_flashvlm, 3, all_pairs=True),
    "flashvlm, video": Method(_video, 1),
    "published loop": Method(_published, 3),
    "vispruner": Method(_vispruner, 3, all_pairs=True),
    "cdpruner": Method(_cdpruner, 3, all_pairs=True),
    "vidcom2 (vLLM)": Method(_of_vllm(vidcom2), 1),
    "evs (vLLM)": Method(_of_vllm(evs), 1),
}
