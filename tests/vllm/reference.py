# SPDX-License-Identifier: Apache-2.0
"""Transformers' own model of a checkpoint, which answers are compared with."""

from pathlib import Path
from typing import Any

import torch


class TransformersModel:
    """Model and processor as Transformers has them: eager attention, float32."""

    def __init__(self, path: Path) -> None:
        import transformers
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        # For some models vLLM 0.31 puts a configuration of its own in the place of Transformers'.
        registered = type(AutoConfig.from_pretrained(path))
        config = getattr(transformers, registered.__name__, registered).from_pretrained(path)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            path, config=config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor: Any = AutoProcessor.from_pretrained(path)
