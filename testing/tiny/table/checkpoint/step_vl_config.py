# SPDX-License-Identifier: Apache-2.0
"""Step-VL's configuration: a tower and a Qwen3."""

from typing import Any

from transformers import PretrainedConfig, Qwen3Config


class StepVLVisionConfig(PretrainedConfig):  # type: ignore[misc, unused-ignore]
    """Configuration of the perception encoder."""

    model_type = "perception_encoder"


class StepVLConfig(PretrainedConfig):  # type: ignore[misc, unused-ignore]
    """Configuration of both parts."""

    model_type = "step_robotics"

    def __init__(self, vision_config: Any = None, text_config: Any = None, **settings: Any) -> None:
        self.vision_config = StepVLVisionConfig(**(vision_config or {}))
        self.text_config = Qwen3Config(**(text_config or {}))
        self.hidden_size = self.text_config.hidden_size
        super().__init__(**settings)

    def get_text_config(self, *_: Any, **__: Any) -> Any:
        """Return the configuration of the language model."""
        return self.text_config
