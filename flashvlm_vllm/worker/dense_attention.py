# SPDX-License-Identifier: Apache-2.0
"""Dense attention in place of vLLM's paged one, for a pass that needs no KV cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from traceback import clear_frames
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from vllm.model_executor.layers.attention import Attention

from flashvlm_vllm.worker.item_prompt import Prompt, word_rows

AT_ONCE: Final = 2**24
"""Attention weights that are computed at a time: 64 MiB of float32."""


@contextmanager
def replaced(module: nn.Module, other: Any) -> Iterator[None]:
    """Let a module call ``other`` in place of its own forward inside the block."""
    vars(module)["forward"] = other.forward if isinstance(other, nn.Module) else other
    try:
        yield
    finally:
        vars(module).pop("forward", None)


class Dense:
    """Causal attention of sequences that lie one after another, without a KV cache."""

    def __init__(self, attention: Attention, lengths: Sequence[int]) -> None:
        self._attention, self._lengths = attention, list(lengths)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        own = self._attention
        heads = (own.num_heads, own.num_kv_heads, own.num_kv_heads)
        every = [
            each.view(len(each), count, -1).transpose(0, 1).split(self._lengths, dim=1)
            for each, count in zip((query, key, value), heads, strict=True)
        ]
        outputs = [self._one(*each) for each in zip(*every, strict=True)]
        return torch.cat(outputs, dim=1).transpose(0, 1).reshape(len(query), -1)

    def _one(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend within one sequence, ``(H, n, d)`` and ``(H_kv, n, d)``."""
        window, length = self._attention.sliding_window, query.shape[1]
        mask = None
        if window is not None and window < length:
            every = torch.arange(length, device=query.device)
            mask = ~hidden_tokens(self._attention, every, length)
        return scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self._attention.impl.scale,
            enable_gqa=len(query) != len(key),
        )[0]


class DenseOfWords:
    """Attention of the words to all tokens of their prompts, without a KV cache."""

    def __init__(
        self,
        attention: Attention,
        prompts: Sequence[Prompt],
        inputs: Sequence[tuple[Tensor, Tensor, Tensor]],
    ) -> None:
        self._attention, self._prompts, self._inputs = attention, prompts, inputs

    def __call__(self, query: Tensor, *_: Any, **__: Any) -> Tensor:
        own = self._attention
        counts = [len(each.before) + len(each.after) for each in self._prompts]
        outputs = [
            self._one(prompt, rows.view(len(rows), own.num_heads, -1), key, value)
            for prompt, rows, (_, key, value) in zip(
                self._prompts, query.split(counts), self._inputs, strict=True
            )
        ]
        return torch.cat(outputs).view(len(query), -1)

    def _one(self, prompt: Prompt, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend within one prompt; ``(W, H, d)``, and twice ``(n, H_kv, d)``."""
        keys, values = (each.transpose(0, 1)[None] for each in (key, value))
        rows = word_rows([prompt], query.device)
        outputs = [
            scaled_dot_product_attention(
                some.transpose(0, 1)[None],
                keys,
                values,
                attn_mask=~hidden_tokens(self._attention, words, len(prompt)),
                scale=self._attention.impl.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )[0].transpose(0, 1)
            for some, words in zip(
                *(each.split(rows_at_once(query.shape[1], prompt)) for each in (query, rows)),
                strict=True,
            )
        ]
        return torch.cat(outputs)


def rows_at_once(heads: int, prompt: Prompt) -> int:
    """Return how many rows of a prompt attend at a time."""
    return max(1, AT_ONCE // (heads * len(prompt)))


def hidden_tokens(attention: Attention, rows: Tensor, length: int) -> Tensor:
    """Return which of the tokens of a prompt some of its rows do not see, ``(rows, length)``."""
    places = torch.arange(length, device=rows.device)
    hidden = places > rows[:, None]
    if attention.sliding_window is not None:
        hidden |= places <= rows[:, None] - attention.sliding_window
    return hidden


def inputs_of(
    attention: Attention, layer: nn.Module, positions: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query ``(n, H, d)``, key and value ``(n, H_kv, d)`` at a layer's attention."""
    try:
        with replaced(attention, _Recorder()):
            layer(positions, state, None)
    except _Recorded as recorded:
        query, key, value = recorded.inputs
        # Frees what the layer has computed besides.
        clear_frames(recorded.__traceback__)
    else:
        raise RuntimeError(f"{type(layer).__name__} did not call its attention")
    heads = (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)
    query, key, value = (
        each.view(len(state), count, -1)
        for each, count in zip((query, key, value), heads, strict=True)
    )
    return query, key, value


class _Recorded(Exception):
    """Ends a layer's forward at its attention, with the attention's inputs."""

    def __init__(self, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        super().__init__("recorded")
        self.inputs = inputs


class _Recorder:
    """Ends a layer's forward at its attention."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        raise _Recorded((query, key, value))
