# SPDX-License-Identifier: Apache-2.0
"""Reads q and k where they enter an encoder attention module."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from vllm.model_executor.layers.attention import MMEncoderAttention


@dataclass
class TappedAttention:
    """What entered the attention: query and key ``(B, T, H, d)`` of this rank's heads."""

    query: Tensor
    key: Tensor


class AttentionTap:
    """Listens at one attention module while a tower runs, and only then."""

    def __init__(self, attention: MMEncoderAttention) -> None:
        self.attention = attention

    @contextmanager
    def listen(self) -> Iterator[list[TappedAttention]]:
        """Collect one entry per call of the attention module inside the block."""
        heard: list[TappedAttention] = []

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            query, key = inputs[:2] if inputs else (named["query"], named["key"])
            heard.append(TappedAttention(self._split_heads(query), self._split_heads(key)))

        handle = self.attention.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield heard
        finally:
            handle.remove()

    def _split_heads(self, states: Tensor) -> Tensor:
        batch, tokens = states.shape[:2]
        return states.reshape(batch, tokens, -1, self.attention.head_size)


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what ``module`` is called with inside the block."""
    heard: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    try:
        yield heard
    finally:
        handle.remove()
