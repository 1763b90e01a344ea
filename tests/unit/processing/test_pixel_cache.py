# SPDX-License-Identifier: Apache-2.0
"""Cache of preprocessed pixels in the API process."""

import pytest
import torch

pytest.importorskip("vllm")

from vllm.multimodal.inputs import (
    MultiModalFieldConfig,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
)

from flashvlm_vllm.processing.pixel_cache import PixelCache

PIXELS = (3, 8, 8)
BYTES = 3 * 8 * 8 * 4


class Processor:
    """Replaces the Hugging Face processor; all pixels of an image have its number as value."""

    def __init__(self, images: list[str]) -> None:
        self.images = images
        self.processed: list[str] = []

    def __call__(self, number: int) -> MultiModalKwargsItem:
        image = self.images[number]
        self.processed.append(image)
        inputs = {"pixel_values": torch.full((1, *PIXELS), float(image))}
        config = {"pixel_values": MultiModalFieldConfig.batched("image")}
        return MultiModalKwargsItems.from_hf_inputs(inputs, config)["image"][0]  # type: ignore[arg-type]


def ask(cache: PixelCache, images: list[str]) -> tuple[list[float], list[str]]:
    processor = Processor(images)
    pixels = cache.of("image", images, processor).get_data()["pixel_values"]
    assert isinstance(pixels, torch.Tensor)
    assert pixels.shape == (len(images), *PIXELS)
    return pixels[:, 0, 0, 0].tolist(), processor.processed


def test_each_image_is_processed_once_and_the_batch_order_is_kept() -> None:
    cache = PixelCache(100 * BYTES)
    assert ask(cache, ["1", "2", "1"]) == ([1, 2, 1], ["1", "2"])
    assert ask(cache, ["3", "2", "1"]) == ([3, 2, 1], ["3"])


@pytest.mark.parametrize(("room", "again"), [(0, ["1", "2", "3"]), (2 * BYTES, ["1", "2", "3"])])
def test_items_that_do_not_fit_are_processed_again(room: int, again: list[str]) -> None:
    cache = PixelCache(room)
    assert ask(cache, ["1", "2", "3"])[0] == [1, 2, 3]
    assert ask(cache, ["1", "2", "3"]) == ([1, 2, 3], again)
