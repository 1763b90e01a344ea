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
    embeddings = _embeddings(model)
    for name, weight in model.named_parameters():
        own = name.rsplit(".", 1)[-1]
        with torch.no_grad():
            if own == "bias":
                weight.zero_()
            elif weight.ndim == 1:
                weight.fill_(1.0)  # the scale of a norm
            else:
                fan_in = weight.shape[-1] if weight.ndim == 2 else weight[0].numel()
                deviation = embeddings.get(id(weight), fan_in**-0.5)
                drawn = torch.randn(weight.shape, generator=generator) * deviation
                weight.copy_(drawn)


def _embeddings(model: nn.Module) -> dict[int, float]:
    """Return the standard deviation of embeddings, by the identity of their weights.

    Where words are read and written through the same weights, these must be smaller than what the
    layers add to them, or the last word of a prompt would be said again and again.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    tables = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    heads = {id(table.weight) for table in tables if isinstance(table, ParallelLMHead)}
    words = {id(table.weight) for table in tables if not isinstance(table, ParallelLMHead)}
    # Gemma multiplies embeddings by this.
    factors = [float(value) for name, value in model.named_buffers() if "normalizer" in name]
    tied = not heads - words
    of_words = (0.1 if tied else 1.0) / max(factors, default=1.0)
    positions = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return {
        **{id(table.weight): 0.3 for table in positions},
        **dict.fromkeys(words, of_words),
    }
