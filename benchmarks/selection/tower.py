# SPDX-License-Identifier: Apache-2.0
"""The selection as a share of the vision tower that runs before it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from benchmarks.selection.clock import DEVICE, median_ms
from benchmarks.selection.methods import METHODS
from benchmarks.selection.synthetic import synthetic_image


@dataclass(frozen=True)
class Share:
    """One image of 576 tokens, 64 kept, in float32 (CPU) or bfloat16 (CUDA) throughout."""

    tower_ms: float
    selection_ms: float

    @property
    def percent(self) -> float:
        """Of the tower's time."""
        return 100 * self.selection_ms / self.tower_ms


def measure_tower() -> Share:
    """CLIP-L/14-336 in shape, 24 layers, with random weights: time does not depend on them."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import CLIPVisionConfig, CLIPVisionModel

    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    # Drawing 300 million random numbers would take longer than the forward pass.
    model = model.to_empty(device=DEVICE).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
        pixels = torch.randn(1, 3, 336, 336, device=DEVICE, dtype=dtype)
        places = torch.arange(577, device=DEVICE)[None]
        for name, buffer in model.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(places)
        tower = median_ms(lambda: model(pixels, output_hidden_states=True))
    image = synthetic_image(1024, seed=0).to(DEVICE)
    image = type(image)(*(tensor.to(dtype) for tensor in image))
    choose = METHODS["flashvlm"].choose
    return Share(tower, median_ms(lambda: choose(image, 64), repeats=9))
