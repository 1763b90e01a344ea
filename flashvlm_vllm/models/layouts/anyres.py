# SPDX-License-Identifier: Apache-2.0
"""Anyres images: one base crop and a grid of tiles, with a newline after each row."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from flashvlm_vllm.processing.family import NO_ARGUMENTS
from flashvlm_vllm.request.budget import TokenCount


class AnyresCounts:
    """Mixin of a processor whose images are a base crop and tiles, with a newline per row."""

    info: Any

    def count_image_tokens(
        self, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> TokenCount:
        """Count an image's tokens; row newlines are not selected from."""
        total = self.info.get_num_image_tokens(image_width=width, image_height=height)
        config = self.info.get_hf_config()
        encoder = self.info.get_vision_encoder_info()
        rows, columns = get_anyres_image_grid_shape(
            image_size=(height, width),
            grid_pinpoints=config.image_grid_pinpoints,
            patch_size=encoder.get_image_size(),
        )
        _, newlines = self.info._get_num_unpadded_features(
            original_height=height,
            original_width=width,
            npatches=encoder.get_patch_grid_length(),
            num_patch_height=rows,
            num_patch_width=columns,
        )
        return TokenCount(total, total - newlines)


def tile_patches(
    tile_grid: tuple[int, int], patches_per_side: int, original_size: tuple[int, int]
) -> Tensor:
    """Return the tile patches that unpadding leaves, in raster order of the tiled image.

    Args:
        tile_grid: number of tiles as (rows, columns).
        patches_per_side: number of patches along one side of a crop.
        original_size: the image's (height, width) in pixels, from which unpadding is computed.

    Returns:
        ``(M,)`` int64 on the host: crop number times patches per crop plus patch number. Crop 0 is
        the base crop, so tiles start at ``patches_per_side ** 2``.

    """
    return tile_picture(tile_grid, patches_per_side, original_size).flatten()


def tile_picture(
    tile_grid: tuple[int, int], patches_per_side: int, original_size: tuple[int, int]
) -> Tensor:
    """Return `tile_patches` as a grid, ``(rows, columns)``."""
    rows, columns = tile_grid
    side = patches_per_side
    patches = torch.arange(rows * columns * side * side) + side * side
    picture = patches.view(rows, columns, side, side).permute(0, 2, 1, 3)
    picture = picture.reshape(1, rows * side, columns * side)
    unpadded: Tensor = unpad_image(picture, original_size)
    return unpadded[0]
