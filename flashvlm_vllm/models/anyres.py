# SPDX-License-Identifier: Apache-2.0
"""How an anyres image (one base crop and a grid of tiles) is laid out and shares its budget."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import unpad_image


def tile_patches(
    tile_grid: tuple[int, int], patches_per_side: int, original_size: tuple[int, int]
) -> Tensor:
    """List the tile patches that survive unpadding, in the raster order of the whole picture.

    Args:
        tile_grid: tiles as (rows, columns).
        patches_per_side: patches along one side of a crop.
        original_size: the image's (height, width) in pixels, which unpadding goes by.

    Returns:
        ``(M,)`` int64 on the host: crop number times patches per crop plus patch number,
        where crop 0 is the base, so tiles start at ``patches_per_side ** 2``.

    """
    return tile_picture(tile_grid, patches_per_side, original_size).flatten()


def tile_picture(
    tile_grid: tuple[int, int], patches_per_side: int, original_size: tuple[int, int]
) -> Tensor:
    """Return `tile_patches` as a picture, ``(rows, columns)``."""
    rows, columns = tile_grid
    side = patches_per_side
    patches = torch.arange(rows * columns * side * side) + side * side
    picture = patches.view(rows, columns, side, side).permute(0, 2, 1, 3)
    picture = picture.reshape(1, rows * side, columns * side)
    unpadded: Tensor = unpad_image(picture, original_size)
    return unpadded[0]


def spread_budget(budget: int, sizes: Sequence[int]) -> list[int]:
    """Share a budget over crops in proportion to their patches.

    With equal crops this is the T/5 each of the LLaVA-NeXT protocol (VisPruner); for other
    aspect ratios a tile cut by the picture's edge gets what its remaining patches are worth.
    What rounding leaves goes to the largest remainders, the earlier crop (the base) first.

    Args:
        budget: tokens to share, 1 to ``sum(sizes)``.
        sizes: patches of each crop.

    Returns:
        tokens per crop, each between 0 and its size, ``budget`` in total.

    """
    total = sum(sizes)
    shares = [budget * size // total for size in sizes]
    by_remainder = sorted(
        range(len(sizes)), key=lambda crop: budget * sizes[crop] % total, reverse=True
    )
    for crop in by_remainder[: budget - sum(shares)]:
        shares[crop] += 1
    return shares
