# SPDX-License-Identifier: Apache-2.0
"""Mistral 3 (Mistral Small 3.1 and later, in Transformers' format)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from vllm.model_executor.models.mistral3 import (
    Mistral3DummyInputsBuilder,
    Mistral3ForConditionalGeneration,
    Mistral3MultiModalProcessor,
    Mistral3ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from flashvlm_vllm.models.layouts.rows import RowModel, RowProcessor
from flashvlm_vllm.vision.tap import inputs_of


class PrunedMistral3Processor(RowProcessor, Mistral3MultiModalProcessor):
    """Mistral 3's processor: rows and columns depend on the image's size."""

    def grid(self, width: int, height: int, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Return the number of token columns and rows of an image."""
        encoder = self.info.get_vision_encoder_info(arguments)
        columns, rows = encoder.get_patch_grid_size(image_width=width, image_height=height)
        return columns, rows


class Mistral3Model(RowModel):
    """Mixin of a model with Mistral 3's projector."""

    def project(self, patches: Tensor, sizes: Any) -> tuple[Tensor, Tensor]:
        """Merge and project patches; a merging selector averages the patch merger's output."""
        with inputs_of(self.multi_modal_projector.linear_1) as captured:
            projected: Tensor = self.multi_modal_projector(patches, sizes)
        return captured[0], projected

    def project_merged(self, merged: Tensor) -> Tensor:
        """Return the embeddings of merged tokens. Merging comes after the patch merger."""
        projector = self.multi_modal_projector
        hidden, _ = projector.linear_1(merged)
        embeddings: Tensor = projector.linear_2(projector.act(hidden))[0]
        return embeddings


@MULTIMODAL_REGISTRY.register_processor(
    PrunedMistral3Processor,
    info=Mistral3ProcessingInfo,
    dummy_inputs=Mistral3DummyInputsBuilder,
)
class PrunedMistral3(Mistral3Model, Mistral3ForConditionalGeneration):
    """Mistral 3 with visual token selection."""
