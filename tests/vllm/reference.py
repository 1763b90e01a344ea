# SPDX-License-Identifier: Apache-2.0
"""Transformers' own model of a checkpoint, which answers are compared with."""

from pathlib import Path
from typing import Any

import torch


class TransformersModel:
    """Model and processor as Transformers has them: eager attention, float32."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor: Any = AutoProcessor.from_pretrained(path)
