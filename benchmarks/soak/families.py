# SPDX-License-Identifier: Apache-2.0
"""The models that the soak is run on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.measuring.folders import MODELS
from testing.tiny.internvl import build_internvl_hf
from testing.tiny.llava import build_llava
from testing.tiny.qwen_vl import UNIT, build_qwen_vl


@dataclass(frozen=True)
class Family:
    """A tiny model with a structure that people serve."""

    build: Callable[[], Path]
    """Write the checkpoint, unless it exists, and return its folder."""
    has_videos: bool = True


FAMILIES: Final = {
    "llava": Family(lambda: build_llava(MODELS / "llava-clip"), has_videos=False),
    "qwen2.5-vl": Family(
        # As many tokens as an image of LLaVA-1.5 has, at most.
        lambda: build_qwen_vl(MODELS / "qwen2_5_vl-576", "2.5", side=24 * UNIT)
    ),
    "internvl": Family(lambda: build_internvl_hf(MODELS / "internvl-hf")),
}
