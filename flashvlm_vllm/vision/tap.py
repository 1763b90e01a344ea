# SPDX-License-Identifier: Apache-2.0
"""Reads queries and keys at the input of an encoder attention module."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.attention import MMEncoderAttention

Read = TypeVar("Read")


class AttentionTap:
    """Captures the inputs of one attention module while a tower runs."""

    def __init__(self, attention: nn.Module, heads: int) -> None:
        """Attach to a layer's attention module.

        Args:
            attention: vLLM's module whose inputs are queries and keys.
            heads: number of heads in total; a rank may have some of them.

        Raises:
            TypeError: queries and keys cannot be read from this kind of attention module.

        """
        if not isinstance(attention, MMEncoderAttention):
            raise TypeError(f"cannot read saliency from a {type(attention).__name__}")
        self._attention = attention
        self._heads = heads
        self.is_sharded = attention.num_heads != heads
        self.scale: float = attention.scale
        """Factor on the logits."""

    def mean_over_heads(self, summed: Tensor) -> Tensor:
        """Return the mean over all heads of values that are summed over this rank's heads."""
        if self.is_sharded:
            summed = tensor_model_parallel_all_reduce(summed)
        return summed / self._heads

    def of_all_heads(self, keys: Tensor, dim: int) -> Tensor:
        """Gather the heads of all ranks along ``dim``."""
        return tensor_model_parallel_all_gather(keys.contiguous(), dim) if self.is_sharded else keys

    @contextmanager
    def listen(self, read: Callable[[Tensor, Tensor], Read]) -> Iterator[list[Read]]:
        """Collect one entry per call of the attention module inside the block.

        Args:
            read: returns an entry for query and key ``(B, T, H, d)`` of this rank's heads. It is
                called immediately, so that both can be freed while the rest of the tower runs.

        """
        entries: list[Read] = []

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            query, key = inputs[:2] if inputs else (named["query"], named["key"])
            entries.append(read(self._split_heads(query), self._split_heads(key)))

        handle = self._attention.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield entries
        finally:
            handle.remove()

    def _split_heads(self, states: Tensor) -> Tensor:
        batch, tokens = states.shape[:2]
        return states.reshape(batch, tokens, -1, self._attention.head_size)


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the first input of each call of ``module`` inside the block."""
    captured: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    try:
        yield captured
    finally:
        handle.remove()
