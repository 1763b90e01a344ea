# SPDX-License-Identifier: Apache-2.0
"""Processors of Phi-3-Vision and Phi-4-Vision."""

from typing import Any

import torch
from transformers import Siglip2ImageProcessor

from .base import FolderProcessor, to_tensor

SIDE = 336
"""Pixels along one side of a tile in Phi-3-Vision."""
ROWS = 12
"""Tokens along one side of a tile."""
TILES = 2


class Phi3VProcessor(FolderProcessor):
    """Gives an image as a whole, and in one tile or two."""

    def __init__(self, folder: str, tokenizer: Any) -> None:
        super().__init__(folder, tokenizer)
        # Public checkpoints number the images of a prompt; one text serves all of them here.
        self.img_tokens = ["<|image_1|>"] * 100

    def calc_num_image_tokens_from_image_size(self, width: int, height: int) -> int:
        """Return how many tokens an image has: tiles, newlines, a separator, the whole."""
        columns, rows = _tiles(width, height)
        return (columns * rows + 1) * ROWS**2 + 1 + (rows + 1) * ROWS

    def pixels(self, images: Any) -> dict[str, Any]:
        """Return views ``[images, 1 + TILES, 3, SIDE, SIDE]`` and sizes in whole tiles."""
        pixels = torch.zeros(len(images), 1 + TILES, 3, SIDE, SIDE)
        sizes = []
        for views, image in zip(pixels, images, strict=True):
            columns, rows = _tiles(*image.size)
            views[0] = to_tensor(image, (SIDE, SIDE))
            tiles = to_tensor(image, (columns * SIDE, rows * SIDE))
            cut = tiles.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE).flatten(1, 2).transpose(0, 1)
            views[1 : 1 + columns * rows] = cut
            sizes.append([rows * SIDE, columns * SIDE])
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def _tiles(width: int, height: int) -> tuple[int, int]:
    """Return columns and rows."""
    if width >= 1.5 * height:
        return TILES, 1
    return (1, TILES) if height >= 1.5 * width else (1, 1)


class Phi4VProcessor(FolderProcessor):
    """Gives the patches of SigLIP 2 for images of any shape."""

    def __init__(self, folder: str, tokenizer: Any) -> None:
        super().__init__(folder, tokenizer)
        self.image_processor = Siglip2ImageProcessor(patch_size=16, max_num_patches=64)

    def pixels(self, images: Any) -> dict[str, Any]:
        """Return patches, which of them are none, and grids."""
        return dict(self.image_processor(images, return_tensors="pt"))
