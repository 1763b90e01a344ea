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
    """Stands in for the Hugging Face processor; an image's pixels are its number."""

    def __init__(self, images: list[str]) -> None:
        self.images = images
        self.processed: list[str] = []

    def __call__(self, number: int) -> MultiModalKwargsItem:
        image = self.images[number]
        self.processed.append(image)
        inputs = {"pixel_values": torch.full((1, *PIXELS), float(image))}
        config = {"pixel_values": MultiModalFieldConfig.batched("image")}
        return MultiModalKwargsItems.from_hf_inputs(inputs, config)["image"][0]  # type: ignore[arg-type]


def ask(memory: PixelCache, images: list[str]) -> tuple[list[float], list[str]]:
    processor = Processor(images)
    pixels = memory.of("image", images, processor)["pixel_values"]
    assert pixels.shape == (len(images), *PIXELS)
    return pixels[:, 0, 0, 0].tolist(), processor.processed


def test_an_image_is_processed_once_and_its_place_in_the_batch_is_kept() -> None:
    memory = PixelCache(100 * BYTES)
    assert ask(memory, ["1", "2", "1"]) == ([1, 2, 1], ["1", "2"])
    assert ask(memory, ["3", "2", "1"]) == ([3, 2, 1], ["3"])


@pytest.mark.parametrize(("room", "again"), [(0, ["1", "2", "3"]), (2 * BYTES, ["1", "2", "3"])])
def test_what_does_not_fit_is_processed_again(room: int, again: list[str]) -> None:
    memory = PixelCache(room)
    assert ask(memory, ["1", "2", "3"])[0] == [1, 2, 3]
    assert ask(memory, ["1", "2", "3"]) == ([1, 2, 3], again)
