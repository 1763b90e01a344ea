# SPDX-License-Identifier: Apache-2.0
"""Random images with a realistic structure: similar neighbours, a shared mean, a few subjects."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Image(NamedTuple):
    features: Tensor
    saliency: Tensor
    text: Tensor
    diversity: Tensor


def make_image(count: int, seed: int = 0, width: int = 24, words: int = 6) -> Image:
    random = torch.Generator().manual_seed(seed)
    subjects = torch.randn(5, width, generator=random)
    mixture = torch.softmax(3 * torch.randn(count, 5, generator=random), dim=1)
    features = mixture @ subjects + 0.2 * torch.randn(count, width, generator=random)
    saliency = torch.softmax(2 * torch.randn(count, generator=random), dim=0)
    lengths = 0.2 + torch.rand(words, 1, generator=random)
    text = lengths * (subjects[:1] + 1.5 * torch.randn(words, width, generator=random))
    diversity = mixture @ torch.randn(5, 16, generator=random) + 0.3 * torch.randn(
        count, 16, generator=random
    )
    return Image(features, saliency, text, diversity)


def assert_exact(kept: Tensor, budget: int, count: int) -> None:
    assert kept.dtype == torch.int64
    indices = kept.tolist()
    assert len(indices) == min(budget, count)
    assert indices == sorted(set(indices))
    assert set(indices) <= set(range(count))
