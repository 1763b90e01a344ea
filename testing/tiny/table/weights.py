# SPDX-License-Identifier: Apache-2.0
"""Weights of the models in the table, drawn in the engine that has loaded them."""

import torch
from torch import nn


def draw(model: nn.Module) -> None:
    """Draw all weights of vLLM's model: words and images then lead to different answers.

    vLLM's own dummy weights are so small that all logits are nearly equal.
    """
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        own = name.rsplit(".", 1)[-1]
        with torch.no_grad():
            if own == "bias":
                weight.zero_()
            elif weight.ndim == 1:
                weight.fill_(1.0)  # the scale of a norm
            else:
                fan_in = weight.shape[-1] if weight.ndim == 2 else weight[0].numel()
                deviation = 1.0 if "embed" in name and weight.ndim == 2 else fan_in**-0.5
                drawn = torch.randn(weight.shape, generator=generator) * deviation
                weight.copy_(drawn)
