# SPDX-License-Identifier: Apache-2.0
"""Processors of Molmo and Molmo2, whose checkpoints carry their own; copied to tiny models.

An image is shown twice, as a view of the whole and as its only tile. A video has one view a frame.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

PATCH = 14


def cut(image: Image.Image, side: int) -> torch.Tensor:
    """Return the patches of one view, shape ``(patches, 3 * PATCH * PATCH)``."""
    pixels = torch.from_numpy(np.array(image.convert("RGB").resize((side, side)))) / 127.5 - 1
    count = side // PATCH
    rows = pixels.reshape(count, PATCH, count, PATCH, 3)
    return rows.permute(0, 2, 1, 3, 4).reshape(count * count, -1)


def pooled(side: int, pool: int, views: int) -> torch.Tensor:
    """Return the patches of each pooled token, by their index over all views."""
    count = side // PATCH
    grid = torch.arange(views * count * count)
    rows = grid.reshape(views, count // pool, pool, count // pool, pool)
    return rows.permute(0, 1, 3, 2, 4).reshape(-1, pool * pool)


class MolmoProcessor(ProcessorMixin):
    """Processor of Molmo: views of 336 pixels, pooled two by two."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, side: int = 336, **_: Any) -> None:
        """Make a processor."""
        super().__init__(tokenizer)  # type: ignore[no-untyped-call]
        self.side = side
        self.image_processor = SimpleNamespace(
            max_crops=1,
            overlap_margins=(4, 4),
            base_image_input_size=(side, side),
            image_patch_size=PATCH,
            image_token_length_w=side // PATCH // 2,
            image_token_length_h=side // PATCH // 2,
        )

    def get_tokens_input(self, text: str, **_: Any) -> list[int]:
        """Return the token ids of a prompt."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def process(
        self,
        text: str | None = None,
        images: list[Image.Image] | None = None,
        tokens: list[int] | None = None,
        **_: Any,
    ) -> BatchFeature:
        """Return token ids behind the first token of all prompts, and the views of images."""
        ids = self.get_tokens_input(text or "") if tokens is None else list(tokens)
        start = self.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        data: dict[str, Any] = {
            "input_ids": torch.tensor([start, *ids] if ids[:1] != [start] else ids)
        }
        if images:
            views = torch.cat([cut(image, self.side).repeat(2, 1, 1) for image in images])
            tokens_per_view = len(views[0]) // 4
            indices = torch.arange(2 * tokens_per_view).reshape(2, -1)
            data["images"] = views
            data["image_masks"] = torch.ones(views.shape[:2])
            data["image_input_idx"] = indices.repeat(len(images), 1)
        return BatchFeature(data)


class Molmo2Processor(ProcessorMixin):
    """Processor of Molmo2."""

    image_use_col_tokens = True
    use_single_crop_col_tokens = None
    use_single_crop_start_token = True
    video_use_col_tokens = False
    use_frame_special_tokens = True

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, side: int = 112, pool: int = 2, **_: Any
    ) -> None:
        """Make a processor."""
        super().__init__(tokenizer)  # type: ignore[no-untyped-call]
        self.side, self.pool = side, pool
        shared = {
            "size": {"height": side, "width": side},
            "patch_size": PATCH,
            "pooling_size": (pool, pool),
        }
        self.image_processor = SimpleNamespace(max_crops=1, overlap_margins=(2, 2), **shared)
        self.video_processor = SimpleNamespace(
            num_frames=8,
            frame_sample_mode="uniform_last_frame",
            max_fps=2,
            sampling_fps=2,
            **shared,
        )

    def __call__(
        self,
        text: str | list[str] | None = None,
        images: list[Image.Image] | None = None,
        videos: list[list[Any]] | None = None,
        **_: Any,
    ) -> BatchFeature:
        """Return token ids, and views with the patches of each pooled token."""
        text = [text or ""] if not isinstance(text, list) else text
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        data: dict[str, Any] = {"input_ids": torch.tensor(ids, dtype=torch.long)}
        count = self.side // PATCH // self.pool
        if images:
            views = [cut(image, self.side).repeat(2, 1, 1) for image in images]
            data["pixel_values"] = torch.cat(views)
            data["image_token_pooling"] = pooled(self.side, self.pool, 2).repeat(len(images), 1)
            data["image_grids"] = torch.tensor([[count] * 4] * len(images))
            data["image_num_crops"] = torch.tensor([2] * len(images))
        if videos:
            frames = [Image.fromarray(np.uint8(frame)) for frame in videos[0][0]]
            data["pixel_values_videos"] = torch.stack([cut(frame, self.side) for frame in frames])
            data["video_token_pooling"] = pooled(self.side, self.pool, len(frames))
            data["video_grids"] = torch.tensor([[len(frames), count, count]])
        return BatchFeature(data)
