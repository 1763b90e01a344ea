# SPDX-License-Identifier: Apache-2.0
"""Dense attention in place of vLLM's paged one, for a pass that needs no KV cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import clear_frames
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from vllm.model_executor.layers.attention import Attention

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


@dataclass(frozen=True)
class Tokens:
    """Keys and values of some tokens of a prompt."""

    places: Tensor
    """``(m,)`` int64 places in the prompt."""
    key: Tensor
    """``(m, H_kv, d)``."""
    value: Tensor
    """``(m, H_kv, d)``."""


class Dense:
    """Causal attention of some tokens of each prompt to these and to others, without a KV cache."""

    def __init__(
        self, attention: Attention, places: Sequence[Tensor], others: Sequence[Tokens] | None
    ) -> None:
        """Stand in for an attention.

        Args:
            attention: the attention.
            places: of the tokens that attend, in each prompt.
            others: the other tokens that they attend to, in each prompt; None if there are none.

        """
        self._attention, self._places = attention, places
        self._others: Sequence[Tokens | None] = others or [None] * len(places)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        own = by_head(self._attention, query, key, value)
        lengths = [len(each) for each in self._places]
        outputs = [
            self._one(places, other, *each)
            for places, other, *each in zip(
                self._places, self._others, *(each.split(lengths) for each in own), strict=True
            )
        ]
        return torch.cat(outputs).flatten(1)

    def _one(
        self, places: Tensor, other: Tokens | None, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Attend within one prompt; ``(m, H, d)``, and twice ``(m, H_kv, d)``."""
        window = self._attention.sliding_window
        if other is None and (window is None or window >= len(places)):
            # Kernels skip what a causal mask hides, and compute what another one hides.
            return self._attended(query, key, value, None)
        seen = places
        if other is not None:
            seen = torch.cat([places, other.places])
            key, value = torch.cat([key, other.key]), torch.cat([value, other.value])
        at_once = rows_at_once(query.shape[1], len(seen))
        outputs = [
            self._attended(some, key, value, ~hidden_tokens(self._attention, rows, seen))
            for some, rows in zip(query.split(at_once), places.split(at_once), strict=True)
        ]
        return torch.cat(outputs)

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Return ``(m, H, d)``; without a mask, each token sees itself and those before it."""
        return scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self._attention.impl.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )[0].transpose(0, 1)


def rows_at_once(heads: int, tokens: int) -> int:
    """Return how many rows attend to so many tokens at a time."""
    return max(1, AT_ONCE // (heads * tokens))


def hidden_tokens(attention: Attention, rows: Tensor, places: Tensor) -> Tensor:
    """Return which tokens some rows do not see, ``(rows, tokens)``, from the places of both."""
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
    return by_head(attention, query, key, value)


def by_head(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(n, H, d)``, ``(n, H_kv, d)`` and ``(n, H_kv, d)``."""
    count, heads = len(query), attention.num_kv_heads
    return (
        query.view(count, attention.num_heads, -1),
        key.view(count, heads, -1),
        value.view(count, heads, -1),
    )


class _Recorded(Exception):
    """Ends a layer's forward at its attention, with the attention's inputs."""

    def __init__(self, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        super().__init__("recorded")
        self.inputs = inputs


class _Recorder:
    """Ends a layer's forward at its attention."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        raise _Recorded((query, key, value))
