# SPDX-License-Identifier: Apache-2.0
"""Inputs with the structure of a vision tower's output: smooth in space and time, a shared mean."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE: Final = 24  # LLaVA-1.5: 24 x 24 = 576 tokens
LLM_WIDTH: Final = 4096
WORDS: Final = 32


class Image(NamedTuple):
    """The input of a selection; of a video, all frames one after the other."""

    features: Tensor
    saliency: Tensor
    text: Tensor
    diversity: Tensor

    def to(self, device: str) -> Image:
        """Return the same on a device."""
        return Image(*(tensor.to(device) for tensor in self))


def synthetic_image(width: int, seed: int) -> Image:
    """Features like those of a vision tower: smooth over the image, with a shared mean.

    Pairwise cosines spread from 0.2 to 0.9; saliency is heavy-tailed as attention is.
    """
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 48, 6, 6, generator=random)
    smooth = F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic")[0].reshape(48, -1).T
    return _image(smooth, LLM_WIDTH, width, random)


def frames_of(count: int) -> tuple[int, int]:
    """Frames, and the side of each, of a video of so many tokens: 576 and multiples of 256."""
    return (4, 12) if count == 576 else (4, 8) if count == 256 else (count // 256, 16)


def synthetic_video(count: int, width: int, seed: int) -> Image:
    """Frames that change slowly. Projected and compared features are one tensor."""
    random = torch.Generator().manual_seed(seed)
    frames, side = frames_of(count)
    shots = max(2, frames // 4)
    coarse = torch.randn(1, 48, shots, 4, 4, generator=random)
    smooth = F.interpolate(coarse, size=(frames, side, side), mode="trilinear")[0]
    return _image(smooth.reshape(48, -1).T, width, width, random)


def grid_of(count: int) -> tuple[int, int]:
    """Rows and columns of an image of so many tokens, as nearly square as they divide."""
    rows = next(each for each in range(math.isqrt(count), 0, -1) if count % each == 0)
    return rows, count // rows


def large_image(count: int, width: int, seed: int) -> Image:
    """One image of any size, smooth at two scales: large regions, and objects in them.

    Args:
        count: tokens, laid out as `grid_of` says.
        width: of the projected features and of those compared, two tensors.
        seed: of everything.

    """
    random = torch.Generator().manual_seed(seed)

    def field(side: int) -> Tensor:
        coarse = torch.randn(1, 48, side, side, generator=random)
        smooth = F.interpolate(coarse, size=grid_of(count), mode="bicubic")
        return smooth[0].flatten(1).T

    drawn = _image(field(6) + 0.6 * field(24), width, width, random)
    # A separate tensor, as the tower's features are separate from the projected ones.
    return drawn._replace(diversity=drawn.features.clone())


def attention_inputs(count: int, heads: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Queries that vary slowly over an image and look for a few kinds of keys.

    Args:
        count: tokens, laid out as `grid_of` says.
        heads: of the attention.
        width: of each head.
        seed: of everything.

    Returns:
        query and key, (1, count, heads, width) float32 each.

    """
    random = torch.Generator().manual_seed(seed)
    rows, columns = grid_of(count)
    place = torch.arange(count)
    down, across = place // columns / rows, place % columns / columns
    waves = torch.stack([(a * down + b * across).sin() for a in range(1, 7) for b in range(1, 7)])
    mix = torch.randn(2, len(waves), heads * width, generator=random)
    query, key = (waves.T @ each / 3 for each in mix)
    # What makes some tokens stand out to all queries.
    key = key + torch.randn(count, 1, generator=random)
    return query.view(1, count, heads, width), key.view(1, count, heads, width)


def _image(smooth: Tensor, width: int, compared_width: int, random: torch.Generator) -> Image:
    count = len(smooth)

    def features(size: int) -> Tensor:
        content = smooth @ torch.randn(48, size, generator=random) / 7
        noise = 0.35 * torch.randn(count, size, generator=random)
        return content + noise + 0.8 * torch.randn(size, generator=random)

    projected = features(width)
    saliency = torch.softmax(2 * smooth[:, 0] + torch.randn(count, generator=random), dim=0)
    text = 0.02 * torch.randn(WORDS, width, generator=random)
    text += 0.004 * projected[torch.randint(count, (WORDS,), generator=random)]
    diversity = projected if compared_width == width else features(compared_width)
    return Image(projected, saliency, text, diversity)
