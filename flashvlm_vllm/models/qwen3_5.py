# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5: Qwen3-VL's tower and prompts with another language model."""

from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5ForConditionalGeneration,
    Qwen3_5ProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from flashvlm_vllm.models.qwen3_vl import PrunedQwen3VLProcessor, Qwen3Model


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3VLProcessor, info=Qwen3_5ProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class PrunedQwen3_5(Qwen3Model, Qwen3_5ForConditionalGeneration):
    """Qwen3.5 with visual token selection."""
