# SPDX-License-Identifier: Apache-2.0
"""The selection as a share of the vision tower that runs before it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.selection.clock import DEVICE, median_ms
from benchmarks.selection.methods import select_all
from benchmarks.selection.synthetic import synthetic_image


@dataclass(frozen=True)
class Share:
    """Images of 576 tokens, 64 kept of each, in float32 (CPU) or bfloat16 (CUDA) throughout."""

    tower_ms: float
    selection_ms: float

    @property
    def percent(self) -> float:
        """Relative to the tower's time."""
        return 100 * self.selection_ms / self.tower_ms


def measure_tower(images: int = 1, layers: int = 24) -> Share:
    """CLIP-L/14-336 in shape, with random weights: time does not depend on them.

    Args:
        images: encoded, and selected from, in one call.
        layers: 24 in the true tower.

    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import CLIPVisionConfig, CLIPVisionModel

    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):
        model: nn.Module = CLIPVisionModel(config)
    # Drawing 300 million random numbers would take longer than the forward pass.
    model = model.to_empty(device=DEVICE).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
        pixels = torch.randn(images, 3, 336, 336, device=DEVICE, dtype=dtype)
        places = torch.arange(577, device=DEVICE)[None]
        for name, buffer in model.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(places)
        tower = median_ms(lambda: model(pixels, output_hidden_states=True))
    drawn = [synthetic_image(1024, seed=number % 8).to(DEVICE) for number in range(images)]
    batch = [type(image)(*(tensor.to(dtype) for tensor in image)) for image in drawn]
    return Share(tower, median_ms(lambda: select_all(batch, 64), repeats=9))
