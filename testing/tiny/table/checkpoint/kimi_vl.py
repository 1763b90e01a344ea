# SPDX-License-Identifier: Apache-2.0
"""Kimi-VL's processor: patches of an image, padded to whole tokens of four patches."""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional

from .base import FolderProcessor, to_patches, to_tensor


class KimiVLProcessor(FolderProcessor):
    """Gives patches and their grid."""

    def __init__(self, folder: str, tokenizer: Any) -> None:
        super().__init__(folder, tokenizer)
        self.image_token = "<|media_pad|>"
        self.image_processor = SimpleNamespace(
            patch_size=14, merge_kernel_size=[2, 2], in_token_limit=1024
        )

    def pixels(self, images: Any) -> dict[str, Any]:
        """Return the patches of all images, and each image's rows and columns of patches."""
        patch, limit = self.image_processor.patch_size, self.image_processor.in_token_limit
        patches, grids = [], []
        for image in images:
            width, height = image.size
            count = (width // patch) * (height // patch)
            scale = math.sqrt(limit / count) if count > limit else 1
            pixels = to_tensor(image, (int(width * scale), int(height * scale)))
            unit = 2 * patch
            right, below = -pixels.shape[2] % unit, -pixels.shape[1] % unit
            pixels = functional.pad(pixels, (0, right, 0, below))
            patches.append(to_patches(pixels, patch))
            grids.append([pixels.shape[1] // patch, pixels.shape[2] // patch])
        return {"pixel_values": torch.cat(patches), "image_grid_hws": torch.tensor(grids)}
