# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL and Qwen3.5 with a mixture of experts, which is in the language model only."""

from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.model_executor.models.qwen3_vl_moe import (
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from flashvlm_vllm.models.qwen3_vl import PrunedQwen3VLProcessor, Qwen3Model


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3VLProcessor, info=Qwen3VLMoeProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class PrunedQwen3VLMoe(Qwen3Model, Qwen3VLMoeForConditionalGeneration):
    """Qwen3-VL's mixture of experts with visual token selection."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3VLProcessor, info=Qwen3_5MoeProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class PrunedQwen3_5Moe(Qwen3Model, Qwen3_5MoeForConditionalGeneration):
    """Qwen3.5's mixture of experts with visual token selection."""
