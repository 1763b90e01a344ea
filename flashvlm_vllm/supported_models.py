# SPDX-License-Identifier: Apache-2.0
"""The covered model architectures, and the classes that replace vLLM's own."""

from typing import Any

MODELS = {
    "GLM4VForCausalLM": "flashvlm_vllm.models.glm4v:PrunedGlm4v",
    "Gemma3ForConditionalGeneration": "flashvlm_vllm.models.gemma3:PrunedGemma3",
    "Glm4vForConditionalGeneration": "flashvlm_vllm.models.glm4_1v:PrunedGlm",
    "InternVLChatModel": "flashvlm_vllm.models.internvl:PrunedInternVLChat",
    "InternVLForConditionalGeneration": "flashvlm_vllm.models.internvl:PrunedInternVL",
    "LlavaForConditionalGeneration": "flashvlm_vllm.models.llava:PrunedLlava",
    "LlavaNextForConditionalGeneration": "flashvlm_vllm.models.llava_next:PrunedLlavaNext",
    "LlavaNextVideoForConditionalGeneration": (
        "flashvlm_vllm.models.llava_next_video:PrunedLlavaNextVideo"
    ),
    "LlavaOnevisionForConditionalGeneration": (
        "flashvlm_vllm.models.llava_onevision:PrunedLlavaOnevision"
    ),
    "Mistral3ForConditionalGeneration": "flashvlm_vllm.models.mistral3:PrunedMistral3",
    "Qwen2VLForConditionalGeneration": "flashvlm_vllm.models.qwen2_vl:PrunedQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "flashvlm_vllm.models.qwen2_vl:PrunedQwen2_5_VL",
    "Qwen3VLForConditionalGeneration": "flashvlm_vllm.models.qwen3_vl:PrunedQwen3VL",
    "Qwen3_5ForConditionalGeneration": "flashvlm_vllm.models.qwen3_5:PrunedQwen3_5",
    "VideoLlavaForConditionalGeneration": (
        "flashvlm_vllm.models.video_llava.pruned:PrunedVideoLlava"
    ),
}
"""Class paths by architecture. vLLM imports a class on first use."""


GENERAL = (
    "AriaForConditionalGeneration",
    "BagelForConditionalGeneration",
    "BailingMoeV3VLForConditionalGeneration",
    "Blip2ForConditionalGeneration",
    "Cohere2VisionForConditionalGeneration",
    "CohereCompassForConditionalGeneration",
    "Cosmos3EdgeForConditionalGeneration",
    "Cosmos3ForConditionalGeneration",
    "DeepseekOCR2ForCausalLM",
    "DeepseekOCRForCausalLM",
    "DeepseekVLV2ForCausalLM",
    "DotsOCRForCausalLM",
    "Ernie4_5_VLMoeForConditionalGeneration",
    "Exaone4_5_ForConditionalGeneration",
    "Gemma3nForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "Granite4VisionForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "InternS1ProForConditionalGeneration",
    "InternS2PreviewForConditionalGeneration",
    "IsaacForConditionalGeneration",
    "KananaVForConditionalGeneration",
    "KeyeForConditionalGeneration",
    "KeyeVL1_5ForConditionalGeneration",
    "KimiVLForConditionalGeneration",
    "Lfm2VlForConditionalGeneration",
    "Llama4ForConditionalGeneration",
    "MiMoV2OmniForCausalLM",
    "MiniCPMV",
    "MiniCPMV4_6ForConditionalGeneration",
    "Molmo2ForConditionalGeneration",
    "MolmoForCausalLM",
    "Moondream3ForCausalLM",
    "MuseGlimmerForConditionalGeneration",
    "OpenCUAForConditionalGeneration",
    "OpenVLAForActionPrediction",
    "Ovis",
    "Ovis2_5",
    "PaddleOCRVLForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "Phi3VForCausalLM",
    "Phi4ForCausalLMV",
    "Qwen2_5OmniForConditionalGeneration",
    "Qwen3OmniMoeForConditionalGeneration",
    "RForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
    "Step3VLForConditionalGeneration",
    "Step3p7ForConditionalGeneration",
    "StepVLForConditionalGeneration",
    "UnlimitedOCRForCausalLM",
)
"""Architectures with the general adapter (`models.general`)."""


def classes() -> dict[str, str]:
    """Return the class paths of all covered architectures."""
    general = "flashvlm_vllm.models.general.classes"
    return MODELS | {architecture: f"{general}:{architecture}" for architecture in GENERAL}


def covers(model_config: Any) -> bool:
    """Return whether budgets apply to a model, given vLLM's ``ModelConfig``.

    The architecture is the one that vLLM runs: with ``--model-impl transformers`` a checkpoint of a
    covered architecture is served by a backend that does not prune.
    """
    return model_config.architecture in MODELS or model_config.architecture in GENERAL
