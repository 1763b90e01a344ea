# SPDX-License-Identifier: Apache-2.0
"""The ``vllm.general_plugins`` entry point. vLLM calls it in every process, maybe twice."""

import os
import sys
from typing import Any

NAME = "flashvlm"

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
        "flashvlm_vllm.models.video_llava_pruned:PrunedVideoLlava"
    ),
}
"""Covered architectures and the classes that replace vLLM's own (imported on first use)."""


def covers(model_config: Any) -> bool:
    """Tell whether budgets apply to a model, given vLLM's ``ModelConfig``.

    What counts is what vLLM runs: with ``--model-impl transformers`` a checkpoint of a covered
    architecture is served by a backend that prunes nothing.
    """
    return model_config.architecture in MODELS


def register() -> None:
    """Offer the command-line flags; take over the covered models only when named.

    Installed but not named in ``VLLM_PLUGINS`` (which ``--plugins flashvlm`` sets), the
    plugin leaves vLLM as it is.
    """
    from flashvlm_vllm import compat

    compat.add_command_line_flags(activate)
    if is_named():
        activate()


def is_named() -> bool:
    """Tell whether ``VLLM_PLUGINS`` names this plugin."""
    return NAME in os.environ.get("VLLM_PLUGINS", "").split(",")


def activate() -> None:
    """Replace the covered models and attach to the places where requests pass. Idempotent.

    Raises:
        UnsupportedVLLMError: vLLM is older than this plugin is made for. A command line ends
            with that line instead.

    """
    from vllm import ModelRegistry

    from flashvlm_vllm import compat
    from flashvlm_vllm.vllm_releases import UnsupportedVLLMError, check_vllm

    try:
        check_vllm()
    except UnsupportedVLLMError as error:
        if compat.is_command_line():
            sys.exit(f"flashvlm: {error}")
        raise
    for architecture, target in MODELS.items():
        ModelRegistry.register_model(architecture, target)
    compat.attach_to_engine()
