# SPDX-License-Identifier: Apache-2.0
"""Position schemes of covered models (rotary embeddings, M-RoPE), from their configurations."""

from typing import Any, Final

AXES: Final = 3
"""Axes of M-RoPE: time, row, column."""
LINE_CHANNELS: Final = 2
"""Position channels of a model with one axis. The model reads the first; the marker of a position
that is still open (`worker.positions`) needs two."""

_ROTARY = ("rope_parameters", "rope_theta", "rope_scaling", "rope_ratio", "original_rope")
"""Fields that mark the configuration of a language model with rotary embeddings; the last is
ChatGLM's."""
_LENGTHS = ("max_position_embeddings", "seq_length", "max_sequence_length")
"""Fields for the number of positions, which vLLM uses as the length of the rotary table."""


def axes_of(model_config: Any) -> int:
    """Return the number of axes of a model's positions; 0 if its position scheme is not known.

    Args:
        model_config: vLLM's ``ModelConfig``.

    """
    if model_config.uses_mrope:
        return AXES
    config = model_config.hf_text_config
    is_rotary = any(getattr(config, name, None) not in (None, {}) for name in _ROTARY)
    return 1 if is_rotary and not model_config.uses_alibi else 0


def table_length(model_config: Any) -> int:
    """Return the number of positions that a model's rotary table has at least.

    With scaled rotary embeddings the table is longer than the configuration says, and has at least
    ``max_model_len`` positions.
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
