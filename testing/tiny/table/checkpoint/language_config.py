# SPDX-License-Identifier: Apache-2.0
"""Configurations that are those of a language model, with a vision tower's fields added."""

from typing import Any

from transformers import Phi3Config, PretrainedConfig


class Phi3VConfig(Phi3Config):  # type: ignore[misc, unused-ignore]
    """Configuration of Phi-3-Vision."""

    model_type = "phi3_v"


class Phi4VConfig(Phi3Config):  # type: ignore[misc, unused-ignore]
    """Configuration of Phi-4-Vision, whose tower's fields stay a dictionary."""

    model_type = "phi4-siglip"


class ErnieVisionConfig(PretrainedConfig):  # type: ignore[misc, unused-ignore]
    """Configuration of Ernie's tower."""

    model_type = "DFNRope_vision_transformer"


class ErnieConfig(PretrainedConfig):  # type: ignore[misc, unused-ignore]
    """Configuration of Ernie 4.5 VL."""

    model_type = "ernie4_5_moe_vl"

    def __init__(self, vision_config: Any = None, **settings: Any) -> None:
        self.vision_config = ErnieVisionConfig(**(vision_config or {}))
        super().__init__(**settings)

    def get_text_config(self, *_: Any, **__: Any) -> Any:
        """Return itself: the language model's fields are not in a part of their own."""
        return self
