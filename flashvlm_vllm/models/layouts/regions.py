# SPDX-License-Identifier: Apache-2.0
"""Regions of the image that grids of tokens cover. For explanations only, not for the selection."""

from typing import Any

from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from flashvlm_vllm.ipc.explain_request import WHOLE, Placed, Region
from flashvlm_vllm.models.layouts.anyres import tile_patches


def cropped(processor: Any, width: int, height: int) -> dict[int, Placed]:
    """Return the region of an image that is scaled, and perhaps cropped, to a square.

    Args:
        processor: the Hugging Face processor for images or videos.
        width: of the image, in pixels.
        height: of the image, in pixels.

    """
    size, crop = processor.size or {}, processor.crop_size or {}
    shortest = size.get("shortest_edge")
    if shortest is not None and getattr(processor, "do_resize", True):
        short, long = sorted((width, height))
        scaled = shortest, int(shortest * long / short)
        width, height = scaled if width <= height else scaled[::-1]
    if not getattr(processor, "do_center_crop", False) or shortest is None:
        return {0: Placed(WHOLE)}
    wide, high = crop["width"], crop["height"]
    left, top = (width - wide) // 2, (height - high) // 2
    return {
        0: Placed(Region(left / width, top / height, (left + wide) / width, (top + high) / height))
    }


def anyres_tiles(config: Any, width: int, height: int) -> dict[int, Placed]:
    """Return the regions of LLaVA-NeXT's base crop, which is the whole image, and of its tiles.

    The image is scaled to fit the tiles, centred, with its aspect ratio. The padding around it has
    no tokens, and a tile without tokens has no number.

    Args:
        config: the model's configuration.
        width: of the image, in pixels.
        height: of the image, in pixels.

    """
    vision = config.vision_config
    edge, side = vision.image_size, vision.image_size // vision.patch_size
    pinpoints = config.image_grid_pinpoints
    rows, columns = get_anyres_image_grid_shape((height, width), pinpoints, edge)
    high, wide = select_best_resolution((height, width), pinpoints)
    if wide * height < high * width:
        inner = wide, min(high, -(-height * wide // width))
    else:
        inner = min(wide, -(-width * high // height)), high
    left, top = (wide - inner[0]) // 2, (high - inner[1]) // 2
    numbers = (tile_patches((rows, columns), side, (height, width)) // side**2).unique().tolist()
    placed = {0: Placed(WHOLE)}
    for part, tile in enumerate(numbers, start=1):
        row, column = divmod(tile - 1, columns)
        placed[part] = Placed(
            Region(
                (column * edge - left) / inner[0],
                (row * edge - top) / inner[1],
                ((column + 1) * edge - left) / inner[0],
                ((row + 1) * edge - top) / inner[1],
            ),
            grid=(side, side),
        )
    return placed


def stretched_tiles(columns: int, rows: int) -> dict[int, Placed]:
    """Return the regions of thumbnail and tiles of an image that is stretched over its tiles."""
    placed = {
        row * columns + column: Placed(
            Region(column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
        )
        for row in range(rows)
        for column in range(columns)
    }
    return {**placed, columns * rows: Placed(WHOLE)}
