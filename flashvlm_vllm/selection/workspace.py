# SPDX-License-Identifier: Apache-2.0
"""How much memory a selection needs, known before it runs."""

from __future__ import annotations

from typing import Final

from flashvlm_vllm.selection.batch import WORKSPACE
from flashvlm_vllm.selection.long_lists import MOST_PAIRED

_COPIES: Final = 4
"""Of the features as float32, at unit length, and in the order of a list."""
_PAIRS: Final = 4
"""Of the similarities of `MOST_PAIRED` tokens, or as much in blocks of longer lists."""
_SCALARS: Final = 64
"""Numbers of 4 bytes for each token beside its features: scores, ranks, places."""


def workspace_bytes(tokens: int, width: int) -> int:
    """Return a bound on the temporary tensors of any built-in selector, whatever the budget.

    Args:
        tokens: N, of one image or video, or of all that are selected from in one call.
        width: of the widest features: before the projector, after it, or keys of all heads.

    """
    pairs = min(tokens, MOST_PAIRED) ** 2
    return max(WORKSPACE, 4 * (tokens * (_COPIES * width + _SCALARS) + _PAIRS * pairs))
