# SPDX-License-Identifier: Apache-2.0
"""Ernie 4.5 VL's processor: patches of images and videos, whose values vLLM normalizes."""

from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from .base import FolderProcessor, to_patches, to_tensor

PATCH, MERGE = 14, 2
UNIT = PATCH * MERGE


class ErnieProcessor(FolderProcessor):
    """Gives patches in the order of tokens, and grids, of images and then of videos."""

    def __init__(self, folder: str, tokenizer: Any) -> None:
        super().__init__(folder, tokenizer)
        self.spatial_conv_size = self.temporal_conv_size = MERGE
        self.image_processor = SimpleNamespace(
            size={"min_pixels": UNIT**2, "max_pixels": 64 * UNIT**2},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            rescale_factor=1 / 255,
        )

    def __call__(
        self,
        text: Any = None,
        images: Any = None,
        return_tensors: Any = None,
        videos: Any = (),
        **_: Any,
    ) -> BatchFeature:
        """Return tokens of the text, and patches and grids."""
        frames = [[image] for image in images or ()]
        frames += [[Image.fromarray(frame) for frame in video] for video in videos or ()]
        found = [self._patches(of_item) for of_item in frames]
        data: dict[str, Any] = dict(self.tokenizer(text))
        data["images"] = torch.cat([patches for patches, _ in found])
        data["grid_thw"] = torch.tensor([grid for _, grid in found])
        return BatchFeature(data, tensor_type=return_tensors)

    def _patches(self, frames: Any) -> tuple[Any, list[int]]:
        width, height = frames[0].size
        limits = self.image_processor.size
        rows, columns = (
            pixels // PATCH for pixels in smart_resize(height, width, factor=UNIT, **limits)
        )
        patches = []
        for frame in frames:
            values = (to_tensor(frame, (columns * PATCH, rows * PATCH)) + 1) * 127.5
            cut = to_patches(values, PATCH).flatten(1)
            blocks = cut.view(rows // MERGE, MERGE, columns // MERGE, MERGE, -1)
            patches.append(blocks.transpose(1, 2).flatten(0, 3))
        return torch.cat(patches), [len(frames), rows, columns]
