# SPDX-License-Identifier: Apache-2.0
"""What LoRA adapters change in the worker, and what the selection must not take from them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn
from vllm.lora.layers import VocabParallelEmbeddingWithLoRA


def adapted_embeddings(model: nn.Module) -> list[VocabParallelEmbeddingWithLoRA]:
    """List the embedding layers of ``model`` that vLLM has wrapped for adapters."""
    return [each for each in model.modules() if isinstance(each, VocabParallelEmbeddingWithLoRA)]


@contextmanager
def without_adapters(layers: Sequence[VocabParallelEmbeddingWithLoRA]) -> Iterator[None]:
    """Let wrapped embedding layers look ids up in the base model.

    A wrapped layer adds, row by row, what the batch of tokens that is about to be computed has
    been mapped to. Ids from elsewhere would get the adapters of whoever is at these places.
    """
    with ExitStack() as stack:
        for layer in layers:
            vars(layer)["forward"] = layer.base_layer.forward
            stack.callback(vars(layer).pop, "forward")
        yield
