# SPDX-License-Identifier: Apache-2.0
"""LightOnOCR: Mistral 3's tower and projector, without text between the rows of an image."""

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.lightonocr import (
    LightOnOCRForConditionalGeneration,
    LightOnOCRMultiModalProcessor,
    LightOnOCRProcessingInfo,
)
from vllm.model_executor.models.mistral3 import Mistral3DummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from flashvlm_vllm.models.mistral3 import Mistral3Model
from flashvlm_vllm.processing.family import NO_ARGUMENTS
from flashvlm_vllm.processing.processor import VisualTokenProcessor
from flashvlm_vllm.request.budget import TokenCount
from flashvlm_vllm.selection import Selector
from flashvlm_vllm.worker.candidates import Item, Part
from flashvlm_vllm.worker.feature_cache import ImageFeatures


class PrunedLightOnOCRProcessor(VisualTokenProcessor, LightOnOCRMultiModalProcessor):
    """LightOnOCR's processor."""

    def count_image_tokens(
        self, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> TokenCount:
        """Count an image's tokens."""
        encoder = self.info.get_vision_encoder_info(arguments)
        total = encoder.get_num_image_tokens(image_width=width, image_height=height)
        return TokenCount(total, total)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLightOnOCRProcessor,
    info=LightOnOCRProcessingInfo,
    dummy_inputs=Mistral3DummyInputsBuilder,
)
class PrunedLightOnOCR(Mistral3Model, LightOnOCRForConditionalGeneration):
    """LightOnOCR with visual token selection."""

    def read_items(self, modality: str, kwargs: dict[str, Any]) -> list[Item]:
        """Read images, ``(3, H, W)`` each. An item's layout is its number of columns."""
        parsed: Any = self._parse_and_validate_image_input(**kwargs)
        pixels = list(parsed["pixel_values"])
        grids = [self.token_grid(image) for image in pixels]
        return [
            Item(image, rows * columns, modality, columns)
            for image, (rows, columns) in zip(pixels, grids, strict=True)
        ]

    def parts(self, item: Item, features: ImageFeatures, selector: Selector) -> list[Part]:
        """Return the image as one part."""
        return [Part.of_clip(features, item.layout)]
