# SPDX-License-Identifier: Apache-2.0
"""Weights of the models in the table: a load format of vLLM that draws them."""

from typing import Any, Final

import torch
from torch import nn

FORMAT: Final = "drawn"
"""Name of the load format, once :func:`register` was called in the engine's process."""


def register() -> None:
    """Make the load format known to vLLM.

    Weights must be drawn before vLLM processes them: its linear layers for CPUs keep a packed copy,
    so that what is written to their parameters afterwards has no effect.
    """
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    @register_model_loader(FORMAT)
    class DrawnModelLoader(DummyModelLoader):
        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            super().load_weights(model, model_config)  # buffers too
            draw(model)


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
