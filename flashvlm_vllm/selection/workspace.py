# SPDX-License-Identifier: Apache-2.0
"""An upper bound on the memory of a selection, for vLLM's memory profiling."""

from __future__ import annotations

from typing import Final

from flashvlm_vllm.selection.batch import WORKSPACE
from flashvlm_vllm.selection.long_lists import MOST_PAIRED

_COPIES: Final = 4
"""Copies of the features: as float32, at unit length, and in list order."""
_PAIRS: Final = 4
"""Copies of the similarities of `MOST_PAIRED` tokens, or of the blocks of longer lists."""
_SCALARS: Final = 64
"""Numbers of 4 bytes per token in addition to its features: scores, ranks, rows and columns."""


def workspace_bytes(tokens: int, width: int) -> int:
    """Return an upper bound in bytes on the temporary tensors of any built-in selector and budget.

    Args:
        tokens: number of tokens of one image or video, or of all in one call.
        width: width of the widest features: before the projector, after it, or keys of all heads.

    """
    pairs = min(tokens, MOST_PAIRED) ** 2
    return max(WORKSPACE, 4 * (tokens * (_COPIES * width + _SCALARS) + _PAIRS * pairs))
