# SPDX-License-Identifier: Apache-2.0
"""Weights of the models in the table, drawn where an engine would load them."""

from typing import Any, Final

import torch
from torch import nn

LOAD_FORMAT: Final = "drawn"


def register_loader() -> None:
    """Make ``load_format="drawn"`` known to vLLM in this process.

    The weights must be drawn while the model is loaded: afterwards vLLM's CPU layers have packed
    theirs and no longer read the parameters.
    """
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader(LOAD_FORMAT)
    class DrawnLoader(BaseModelLoader):  # type: ignore[misc, unused-ignore]
        """Draws weights. Buffers keep the values that the model gives them."""

        def download_model(self, model_config: Any) -> None:
            """Download nothing."""

        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            """Draw all weights."""
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
