# SPDX-License-Identifier: Apache-2.0
"""Language models whose first decoder layers selectors can use. Imports neither vLLM nor torch."""

from typing import Any, Final

LANGUAGE_MODELS: Final = frozenset(
    {
        "gemma3_text",
        "glm4v_text",
        "llama",
        "mistral",
        "qwen2",
        "qwen2_5_vl_text",
        "qwen2_vl_text",
        "qwen3",
        "qwen3_vl_text",
    }
)
"""Types of language models, by Transformers' names, whose first three decoder layers have a plain
causal attention and are called in the same way. Each has a test."""

FIRST_LAYERS: Final = 3
"""Decoder layers that selectors use, all on the first pipeline stage."""


def why_not_used(config: Any) -> str | None:
    """Return why selectors cannot use a language model; ``None`` if they can.

    Args:
        config: vLLM's ``VllmConfig``.

    """
    text = config.model_config.hf_text_config
    if text.model_type not in LANGUAGE_MODELS:
        known = ", ".join(sorted(LANGUAGE_MODELS))
        return f"the language model is of type {text.model_type}; supported are {known}"
    # Asked before there are workers, so this is the number of layers of the first stage.
    if config.model_config.get_num_layers(config.parallel_config) < FIRST_LAYERS:
        return f"the first pipeline stage has fewer than {FIRST_LAYERS} decoder layers"
    return None
