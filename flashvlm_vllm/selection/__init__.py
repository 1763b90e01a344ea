# SPDX-License-Identifier: Apache-2.0
"""FlashVLM's visual token selection (arXiv 2512.20561) in plain torch; never imports vLLM."""

from flashvlm_vllm.selection.config import ABLATIONS, VIDEO, SelectionConfig
from flashvlm_vllm.selection.select import (
    fused_scores,
    select_visual_tokens,
    select_visual_tokens_ragged,
)
from flashvlm_vllm.selection.selectors import (
    LanguageAttention,
    Merged,
    Selection,
    Selector,
    SelectorError,
    VisualTokens,
    run_selector,
    run_selector_many,
    stand_in,
)

__all__ = [
    "ABLATIONS",
    "VIDEO",
    "LanguageAttention",
    "Merged",
    "Selection",
    "SelectionConfig",
    "Selector",
    "SelectorError",
    "VisualTokens",
    "fused_scores",
    "run_selector",
    "run_selector_many",
    "select_visual_tokens",
    "select_visual_tokens_ragged",
    "stand_in",
]
