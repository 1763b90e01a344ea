# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL and Qwen2.5-VL."""

from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from flashvlm_vllm.models.layouts.mrope import MRopeCounts, MRopeModel


class PrunedQwen2VLProcessor(MRopeCounts, Qwen2VLMultiModalProcessor):
    """Qwen2-VL's processor."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen2VLProcessor, info=Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class PrunedQwen2VL(MRopeModel, Qwen2VLForConditionalGeneration):
    """Qwen2-VL with visual token selection."""


class PrunedQwen2_5_VLProcessor(MRopeCounts, Qwen2_5_VLMultiModalProcessor):
    """Qwen2.5-VL's processor."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen2_5_VLProcessor,
    info=Qwen2_5_VLProcessingInfo,
    dummy_inputs=Qwen2_5_VLDummyInputsBuilder,
)
class PrunedQwen2_5_VL(MRopeModel, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with visual token selection."""

    prunes_videos_itself = True

    @property
    def layer(self) -> int:
        """The last layer with full attention; in released models the last layer of all."""
        return int(max(self.visual.fullatt_block_indexes))
