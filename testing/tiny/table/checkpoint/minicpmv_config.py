# SPDX-License-Identifier: Apache-2.0
"""MiniCPM-V's configuration: that of its language model, and a tower's."""

from typing import Any

from transformers import Qwen3Config, SiglipVisionConfig


class MiniCPMVConfig(Qwen3Config):  # type: ignore[misc, unused-ignore]
    """Configuration of MiniCPM-V 4.5."""

    model_type = "minicpmv"

    def __init__(self, vision_config: Any = None, **settings: Any) -> None:
        self.vision_config = SiglipVisionConfig(**(vision_config or {}))
        super().__init__(**settings)
