# SPDX-License-Identifier: Apache-2.0
"""How covered models know where a token stands, read off their configurations."""

from typing import Any, Final

AXES: Final = 3
"""Of M-RoPE: time, row, column."""
LINE_CHANNELS: Final = 2
"""Channels of the positions of a model with one axis, which reads the first: what stands in an open
placeholder (`models.positions`) is two numbers."""

_ROTARY = ("rope_parameters", "rope_theta", "rope_scaling", "rope_ratio", "original_rope")
"""What configurations of language models with rotary embeddings have; the last is ChatGLM's."""
_LENGTHS = ("max_position_embeddings", "seq_length", "max_sequence_length")
"""What language models call the number of positions in their configurations, and vLLM takes for
their rotary tables."""


def axes_of(model_config: Any) -> int:
    """Count the axes of a model's positions; 0 where its scheme is not known.

    Args:
        model_config: vLLM's.

    """
    if model_config.uses_mrope:
        return AXES
    config = model_config.hf_text_config
    is_rotary = any(getattr(config, name, None) not in (None, {}) for name in _ROTARY)
    return 1 if is_rotary and not model_config.uses_alibi else 0


def table_length(model_config: Any) -> int:
    """Return how many positions a model's rotary table certainly has.

    Scaled embeddings have a longer table than the configuration says, at least ``max_model_len``.
    """
    config = model_config.hf_text_config
    known = (getattr(config, name, None) for name in _LENGTHS)
    given = next((each for each in known if isinstance(each, int)), model_config.max_model_len)
    return max(given, model_config.max_model_len) if _is_scaled(config) else given


def _is_scaled(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = rope.values() if any(isinstance(value, dict) for value in rope.values()) else [rope]
    kinds = {own.get("rope_type", own.get("type", "default")) for own in each if own}
    return bool(kinds) and "default" not in kinds
