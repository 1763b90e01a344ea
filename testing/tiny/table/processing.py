# SPDX-License-Identifier: Apache-2.0
"""A processor for checkpoints that carry their own, copied into the folders of tiny models.

It scales images to whole groups of patches and cuts them into patches, row by row.
"""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin


def scaled(size: int, factor: float, unit: int) -> int:
    """Return a side of a scaled image, in whole units."""
    return max(unit, math.floor(size * factor / unit) * unit)


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, **_: Any
) -> tuple[int, int]:
    """Return height and width of an image whose sides are multiples of ``factor``.

    vLLM has the same for Keye and calls this one for Kanana.
    """
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if high * wide > max_pixels:
        scale = math.sqrt(max_pixels / (height * width))
        return scaled(height, scale, factor), scaled(width, scale, factor)
    if high * wide < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        return (
            math.ceil(height * scale / factor) * factor,
            math.ceil(width * scale / factor) * factor,
        )
    return high, wide


class Patches:
    """Cuts images into patches."""

    def __init__(self, patch_size: int, merge_size: int, min_pixels: int, max_pixels: int) -> None:
        """Make a processor of images of so many pixels."""
        self.patch_size = patch_size
        self.merge_size = merge_size
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.size = {"min_pixels": min_pixels, "max_pixels": max_pixels}

    def cut(self, frames: list[Image.Image]) -> tuple[torch.Tensor, list[int]]:
        """Return patches ``(patches, 3, side, side)`` and their grid: frames, rows, columns."""
        unit, side = self.patch_size * self.merge_size, self.patch_size
        width, height = frames[0].size
        high, wide = smart_resize(height, width, unit, self.min_pixels, self.max_pixels)
        cut = []
        for frame in frames:
            scaled_frame = frame.convert("RGB").resize((wide, high), Image.Resampling.BICUBIC)
            pixels = torch.from_numpy(np.array(scaled_frame)).permute(2, 0, 1) / 127.5 - 1
            rows = pixels.reshape(3, high // side, side, wide // side, side)
            cut.append(rows.permute(1, 3, 0, 2, 4).reshape(-1, 3, side, side))
        return torch.cat(cut), [len(frames), high // side, wide // side]

    def __call__(self, image: Image.Image) -> dict[str, Any]:
        """Return one image's patches and grid, in the form of Kanana's processor."""
        patches, (frames, rows, columns) = self.cut([image])
        merge = self.merge_size
        blocks = patches.reshape(rows // merge, merge, columns // merge, merge, -1)
        return {
            "pixel_values": blocks.permute(0, 2, 1, 3, 4).reshape(rows * columns, -1),
            "image_meta": {
                "vision_grid_thw": (frames, rows, columns),
                "image_token_thw": (frames, rows // merge, columns // merge),
            },
        }


class PatchProcessor(ProcessorMixin):
    """Processor of Keye, Keye 1.5 and Kanana."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        patch_size: int = 14,
        merge_size: int = 2,
        min_pixels: int = 28**2,
        max_pixels: int = 224**2,
        **_: Any,
    ) -> None:
        """Make a processor."""
        super().__init__(tokenizer)  # type: ignore[no-untyped-call]
        self.image_processor = Patches(patch_size, merge_size, min_pixels, max_pixels)
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.frame_token = "<|frame|>"
        self.fast_start, self.fast_end = "<|fast_start|>", "<|fast_end|>"

    def __call__(
        self,
        text: str | list[str] | None = None,
        images: list[Image.Image] | None = None,
        videos: list[Any] | None = None,
        **_: Any,
    ) -> BatchFeature:
        """Return patches and grids of images and videos, and the text's token ids."""
        data: dict[str, Any] = {}
        if images:
            cut = [self.image_processor.cut([image]) for image in images]
            data["pixel_values"] = torch.cat([patches for patches, _grid in cut])
            data["image_grid_thw"] = torch.tensor([grid for _patches, grid in cut])
        if videos:
            cut = [
                self.image_processor.cut([Image.fromarray(np.uint8(frame)) for frame in video])
                for video in videos
            ]
            data["pixel_values_videos"] = torch.cat([patches for patches, _grid in cut])
            data["video_grid_thw"] = torch.tensor([grid for _patches, grid in cut])
            data["num_frames"] = data["video_grid_thw"][:, 0]
        if text is not None:
            data["input_ids"] = torch.tensor(
                self.tokenizer([text] if isinstance(text, str) else text).input_ids
            )
        return BatchFeature(data)


class SquareProcessor(ProcessorMixin):
    """Processor of Nemotron Parse: images of one size, nothing in the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, side: int = 128, **_: Any) -> None:
        """Make a processor of images of so many pixels along one side."""
        super().__init__(tokenizer)  # type: ignore[no-untyped-call]
        self.side = side

    def __call__(
        self,
        text: str | list[str] | None = None,
        images: list[Image.Image] | None = None,
        **_: Any,
    ) -> BatchFeature:
        """Return pixels ``(images, 3, side, side)`` and the text's token ids."""
        texts = text if isinstance(text, list) else [text or ""]
        ids = self.tokenizer(texts, add_special_tokens=False).input_ids
        data: dict[str, Any] = {"input_ids": torch.tensor(ids, dtype=torch.long)}
        if images:
            squares = [image.convert("RGB").resize((self.side, self.side)) for image in images]
            pixels = torch.from_numpy(np.stack([np.array(square) for square in squares]))
            data["pixel_values"] = pixels.permute(0, 3, 1, 2) / 255
        return BatchFeature(data)
