# SPDX-License-Identifier: Apache-2.0
"""Nemotron Nano VL's configuration: a tower, which is a name and arguments, and a Nemotron-H."""

from typing import Any

from transformers import NemotronHConfig, PretrainedConfig


class NemotronVisionConfig(PretrainedConfig):  # type: ignore[misc, unused-ignore]
    """Configuration of RADIO."""

    model_type = "radio_args"


class NemotronVLConfig(PretrainedConfig):  # type: ignore[misc, unused-ignore]
    """Configuration of both parts."""

    model_type = "NemotronH_Nano_VL_V2"

    def __init__(self, vision_config: Any = None, llm_config: Any = None, **settings: Any) -> None:
        self.vision_config = NemotronVisionConfig(**(vision_config or {}))
        self.text_config = NemotronHConfig(**(llm_config or {}))
        super().__init__(**settings)

    def get_text_config(self, *_: Any, **__: Any) -> Any:
        """Return the configuration of the language model."""
        return self.text_config
