# SPDX-License-Identifier: Apache-2.0
"""Regions of grids in the picture, compared with the Hugging Face processors' output."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flashvlm_vllm.token_costs import TokenCosts
from testing.tiny.internvl import build_internvl_hf
from testing.tiny.llava import build_llava
from testing.tiny.video_llava import build_video_llava
from tests.engine.conftest import REPOSITORY

MODELS = REPOSITORY / ".models"
BUILD: dict[str, Callable[[], Path]] = {
    "llava-clip": lambda: build_llava(MODELS / "llava-clip"),
    "llava-siglip": lambda: build_llava(MODELS / "llava-siglip", tower="siglip"),
    "llava-next": lambda: build_llava(MODELS / "llava-next", next=True),
    "internvl-hf": lambda: build_internvl_hf(MODELS / "internvl-hf"),
    "video-llava": lambda: build_video_llava(MODELS / "video-llava"),
}


def gradient(width: int, height: int) -> Image.Image:
    """Return a picture whose red and green encode the position; blue marks it as not padding."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 255)], axis=2).astype(np.uint8))


@pytest.mark.parametrize("model", BUILD)
def test_the_region_of_a_crop_is_the_area_that_it_shows(model: str) -> None:
    processor: Any = TokenCosts(str(BUILD[model]()))._processor
    for size in ((800, 300), (300, 800), (640, 640)):
        check(processor, size)


def check(processor: Any, size: tuple[int, int]) -> None:
    images = processor.info.get_hf_processor().image_processor
    processed = images(gradient(*size), return_tensors="pt")
    (pixels,) = (processed[name] for name in processed if name.startswith("pixel_values"))
    crops = pixels.reshape(-1, *pixels.shape[-3:]).float()
    mean, std = (
        torch.tensor(each)[:, None, None] for each in (images.image_mean, images.image_std)
    )
    shown = (crops * std + mean).clamp(0, 1)
    placed = processor.part_regions("image", *size)
    assert len(placed) >= len(crops)
    for number, crop in enumerate(shown):
        left, top, right, bottom = placed[number].region
        wide = crop.shape[-1]
        # Not at the edges, where scaling and padding blur; padding has no blue.
        for at in (0.2, 0.5, 0.8):
            red, green, blue = crop[:, int(at * wide), int(at * wide)].tolist()
            expected = left + at * (right - left), top + at * (bottom - top)
            if all(0.02 < each < 0.98 for each in expected):
                assert blue > 0.9
                assert (red, green) == pytest.approx(expected, abs=0.02)
            elif any(not -0.02 < each < 1.02 for each in expected):
                assert blue < 0.1
