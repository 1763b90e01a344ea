# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL with a narrow tower, which accepts images of 16,384 visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from testing.tiny.qwen_vl import UNIT, build_qwen_vl

SIDE: Final = 3584
"""Pixels along one side of the largest image."""
WINDOW: Final = 112
"""Pixels along one side of a window of the tower's attention, as in Qwen2.5-VL."""
TOKENS: Final = (SIDE // UNIT) ** 2
CONTEXT: Final = 17_408


def build(path: Path, layers: int, full: Sequence[int]) -> Path:
    """Write the checkpoint, unless it exists, and return its folder.

    Args:
        path: of the folder.
        layers: of the tower.
        full: the layers that attend over the whole image; the others do so within windows.

    """
    return build_qwen_vl(path, "2.5", layers=layers, full=full, window=WINDOW, side=SIDE)
