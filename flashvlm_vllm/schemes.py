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
