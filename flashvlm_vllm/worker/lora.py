# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters in the worker: the selection uses the embeddings of the base model."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn
from vllm.lora.layers import VocabParallelEmbeddingWithLoRA


def adapted_embeddings(model: nn.Module) -> list[VocabParallelEmbeddingWithLoRA]:
    """Return the embedding layers of ``model`` that vLLM has wrapped for LoRA adapters."""
    return [each for each in model.modules() if isinstance(each, VocabParallelEmbeddingWithLoRA)]


@contextmanager
def without_adapters(layers: Sequence[VocabParallelEmbeddingWithLoRA]) -> Iterator[None]:
    """Let wrapped embedding layers use only the base model inside the block.

    A wrapped layer applies, row by row, the adapters of the tokens scheduled in this step. Other
    ids would get the adapters of unrelated requests.
    """
    with ExitStack() as stack:
        for layer in layers:
            vars(layer)["forward"] = layer.base_layer.forward
            stack.callback(vars(layer).pop, "forward")
        yield
