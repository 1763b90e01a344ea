# SPDX-License-Identifier: Apache-2.0
"""The covered model architectures, and the classes that replace vLLM's own."""

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

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

FORCED: Final = "FLASHVLM_GENERAL_ADAPTER"
"""Environment variable: architectures, separated by commas, that get the general adapter instead of
their own, to compare the two."""
GENERAL_CLASSES: Final = "flashvlm_vllm.models.general.classes"
FILE: Final = Path(__file__).with_name("architectures.json")
"""What the tests found about every other architecture; `scripts.architectures` writes it."""


@dataclass(frozen=True)
class Row:
    """What is known of an architecture of vLLM's that takes images or videos."""

    adapter: str
    """``own``, ``general`` or ``none``."""
    is_tested: bool
    """Whether the battery of guarantees ran on it and holds."""
    about: str
    """In words: what was found, or why it was not tested or is refused."""

    def __str__(self) -> str:
        adapter = {"own": "adapter of its own", "general": "general adapter"}.get(self.adapter)
        tested = "tested" if self.is_tested else "not tested"
        return f"{adapter}, {tested}; {self.about}" if adapter else f"no adapter; {self.about}"


@cache
def rows() -> dict[str, Row]:
    """Return the architectures of `FILE`."""
    return {name: Row(**own) for name, own in json.loads(FILE.read_text()).items()}


def classes() -> dict[str, str]:
    """Return the class paths of all covered architectures."""
    general = {name for name, own in rows().items() if own.adapter == "general"}
    forced = {name for name in os.environ.get(FORCED, "").split(",") if name in MODELS}
    own = {name: path for name, path in MODELS.items() if name not in forced}
    return {name: f"{GENERAL_CLASSES}:{name}" for name in sorted(general | forced)} | own


def is_general(architecture: str) -> bool:
    """Return whether an architecture has the general adapter."""
    return classes().get(architecture, "").startswith(GENERAL_CLASSES)


def may_fail(architecture: str) -> bool:
    """Return whether no test has shown that the general adapter works with an architecture."""
    row = rows().get(architecture)
    is_shown = row is not None and row.adapter == "general" and row.is_tested
    return is_general(architecture) and not is_shown


def covers(model_config: Any) -> bool:
    """Return whether budgets apply to a model, given vLLM's ``ModelConfig``.

    The architecture is the one that vLLM runs: with ``--model-impl transformers`` a checkpoint of a
    covered architecture is served by a backend that does not prune.
    """
    return model_config.architecture in classes()


def why_not_covered(model_config: Any) -> str:
    """Return why budgets do not apply to a model, as a clause."""
    name = model_config.architecture
    known = rows().get(name)
    if known is None:
        return f"{name} is not among the {len(classes())} covered architectures"
    return f"{name}: {known.about}"
