# SPDX-License-Identifier: Apache-2.0
"""Reads q and k where they enter an encoder attention module."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.attention import MMEncoderAttention

Read = TypeVar("Read")


class AttentionTap:
    """Listens at one attention module while a tower runs, and only then."""

    def __init__(self, attention: nn.Module, heads: int) -> None:
        """Attach to vLLM's module of a layer.

        Args:
            attention: the module that queries and keys enter.
            heads: of the tower as a whole; a rank may hold some of them.

        Raises:
            TypeError: the attention is of a kind that does not see queries and keys.

        """
        if not isinstance(attention, MMEncoderAttention):
            raise TypeError(f"cannot read saliency from a {type(attention).__name__}")
        self._attention = attention
        self._heads = heads
        self.is_sharded = attention.num_heads != heads
        self.scale: float = attention.scale
        """Factor on the logits."""

    def mean_over_heads(self, summed: Tensor) -> Tensor:
        """Return the mean over the tower's heads of what was summed over this rank's."""
        if self.is_sharded:
            summed = tensor_model_parallel_all_reduce(summed)
        return summed / self._heads

    def of_all_heads(self, keys: Tensor, dim: int) -> Tensor:
        """Put this rank's heads, along ``dim``, together with those of the others."""
        return tensor_model_parallel_all_gather(keys.contiguous(), dim) if self.is_sharded else keys

    @contextmanager
    def listen(self, read: Callable[[Tensor, Tensor], Read]) -> Iterator[list[Read]]:
        """Collect one entry per call of the attention module inside the block.

        Args:
            read: makes an entry of query and key ``(B, T, H, d)``, of this rank's heads. It is
                called at once, so that neither stays alive while the rest of the tower runs.

        """
        heard: list[Read] = []

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            query, key = inputs[:2] if inputs else (named["query"], named["key"])
            heard.append(read(self._split_heads(query), self._split_heads(key)))

        handle = self._attention.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield heard
        finally:
            handle.remove()

    def _split_heads(self, states: Tensor) -> Tensor:
        batch, tokens = states.shape[:2]
        return states.reshape(batch, tokens, -1, self._attention.head_size)


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what ``module`` is called with inside the block."""
    heard: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    try:
        yield heard
    finally:
        handle.remove()
