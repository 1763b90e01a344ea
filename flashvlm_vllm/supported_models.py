# SPDX-License-Identifier: Apache-2.0
"""The covered model architectures, and the classes that replace vLLM's own."""

from typing import Any

MODELS = {
    "Eagle2_5_VLForConditionalGeneration": "flashvlm_vllm.models.internvl_relatives:PrunedEagle",
    "GLM4VForCausalLM": "flashvlm_vllm.models.glm4v:PrunedGlm4v",
    "Gemma3ForConditionalGeneration": "flashvlm_vllm.models.gemma3:PrunedGemma3",
    "Glm4vForConditionalGeneration": "flashvlm_vllm.models.glm4_1v:PrunedGlm",
    "Glm4vMoeForConditionalGeneration": "flashvlm_vllm.models.glm4_1v:PrunedGlmMoe",
    "GlmOcrForConditionalGeneration": "flashvlm_vllm.models.glm4_1v:PrunedGlmOcr",
    "H2OVLChatModel": "flashvlm_vllm.models.internvl_relatives:PrunedH2OVL",
    "InternS1ForConditionalGeneration": "flashvlm_vllm.models.internvl:PrunedInternVL",
    "InternVLChatModel": "flashvlm_vllm.models.internvl:PrunedInternVLChat",
    "InternVLForConditionalGeneration": "flashvlm_vllm.models.internvl:PrunedInternVL",
    "LightOnOCRForConditionalGeneration": "flashvlm_vllm.models.lightonocr:PrunedLightOnOCR",
    "LlavaForConditionalGeneration": "flashvlm_vllm.models.llava:PrunedLlava",
    "LlavaNextForConditionalGeneration": "flashvlm_vllm.models.llava_next:PrunedLlavaNext",
    "LlavaNextVideoForConditionalGeneration": (
        "flashvlm_vllm.models.llava_next_video:PrunedLlavaNextVideo"
    ),
    "LlavaOnevisionForConditionalGeneration": (
        "flashvlm_vllm.models.llava_onevision:PrunedLlavaOnevision"
    ),
    "Mistral3ForConditionalGeneration": "flashvlm_vllm.models.mistral3:PrunedMistral3",
    "NVLM_D": "flashvlm_vllm.models.internvl_relatives:PrunedNVLM",
    "QianfanOCRForConditionalGeneration": (
        "flashvlm_vllm.models.internvl_relatives:PrunedQianfanOCR"
    ),
    "Qwen2VLForConditionalGeneration": "flashvlm_vllm.models.qwen2_vl:PrunedQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "flashvlm_vllm.models.qwen2_vl:PrunedQwen2_5_VL",
    "Qwen3VLForConditionalGeneration": "flashvlm_vllm.models.qwen3_vl:PrunedQwen3VL",
    "Qwen3VLMoeForConditionalGeneration": "flashvlm_vllm.models.qwen3_moe:PrunedQwen3VLMoe",
    "Qwen3_5ForConditionalGeneration": "flashvlm_vllm.models.qwen3_5:PrunedQwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "flashvlm_vllm.models.qwen3_moe:PrunedQwen3_5Moe",
    "SkyworkR1VChatModel": "flashvlm_vllm.models.internvl_relatives:PrunedSkyworkR1V",
    "VideoLlavaForConditionalGeneration": (
        "flashvlm_vllm.models.video_llava.pruned:PrunedVideoLlava"
    ),
}
"""Class paths by architecture. vLLM imports a class on first use."""


def covers(model_config: Any) -> bool:
    """Return whether budgets apply to a model, given vLLM's ``ModelConfig``.

    The architecture is the one that vLLM runs: with ``--model-impl transformers`` a checkpoint of a
    covered architecture is served by a backend that does not prune.
    """
    return model_config.architecture in MODELS
