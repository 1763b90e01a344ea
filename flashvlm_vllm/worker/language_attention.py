# SPDX-License-Identifier: Apache-2.0
"""Reads which visual tokens the words of a prompt attend to in the second decoder layer.

The first decoder layer runs on all tokens of an item and on its prompt's words, and the second up
to its attention. The layers are those of the loaded model, called as vLLM calls them: quantized
weights, norms and rotary embeddings of any kind are their own. Only the paged attention between
them is replaced by a dense one, which needs no KV cache.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.forward_context import set_forward_context
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType

from flashvlm_vllm.selection import LanguageAttention

LAYERS: Final = 2
"""Decoder layers that are used: the first whole, the second up to its attention."""
_AT_ONCE: Final = 2**24
"""Attention weights that are computed at a time: 64 MiB of float32."""


@dataclass(frozen=True)
class Prompt:
    """One item in a prompt of its own: the start of the user's turn, the item, the question."""

    visual: Tensor
    """``(N, D)`` input embeddings of all tokens of the item."""
    before: Tensor
    """``(P, D)`` input embeddings of the words before them."""
    after: Tensor
    """``(R, D)`` input embeddings of the words after them, R >= 1."""
    question_words: int
    """Number of rows of ``after`` that are the question's, the first ones."""
    positions: Tensor
    """``(N, axes)`` int64 position of each token relative to the item's start; 1 or 3 axes."""
    deeper: Tensor | None = None
    """``(N, D)`` features that the model adds after its first layer; ``None`` if it adds none."""

    def __len__(self) -> int:
        return len(self.before) + len(self.visual) + len(self.after)

    def embeddings(self) -> Tensor:
        """Return ``(n, D)``."""
        return torch.cat([self.before, self.visual, self.after])

    def all_positions(self) -> Tensor:
        """Return ``(axes, n)`` int64 positions."""
        first, device = len(self.before), self.positions.device
        extent = self.positions.amax() + 1
        text = torch.arange(first + len(self.after), device=device)
        text = text.view(-1, 1).expand(-1, self.positions.shape[1])
        return torch.cat([text[:first], self.positions + first, text[first:] + extent]).T

    def added(self) -> Tensor:
        """Return ``(n, D)``: ``deeper`` at the visual tokens, zeros elsewhere."""
        if self.deeper is None:
            return torch.zeros_like(self.embeddings())
        zeros = torch.zeros_like
        return torch.cat([zeros(self.before), self.deeper, zeros(self.after)])


class LanguageAttentionReader:
    """Reads attention from the first layers of one loaded language model."""

    def __init__(self, language_model: Any, vllm_config: VllmConfig) -> None:
        """Find the layers.

        Raises:
            ValueError: the model's layers cannot be used; the message says why.

        """
        self._layers, self._attentions = first_layers(language_model)
        self._config = vllm_config
        self._adapted = [
            each
            for layer in self._layers
            for each in layer.modules()
            if isinstance(each, BaseLayerWithLoRA)
        ]

    def read(self, prompts: Sequence[Prompt]) -> list[LanguageAttention]:
        """Read the attention of each prompt's words after its visual tokens.

        All prompts run through the linear layers together, and attend one by one. With tensor
        parallelism every rank must call this with the same prompts.

        Args:
            prompts: at least one.

        """
        lengths = [len(each) for each in prompts]
        hidden = torch.cat([each.embeddings() for each in prompts])
        positions = torch.cat([each.all_positions() for each in prompts], dim=1)
        if len(positions) == 1:
            positions = positions[0]
        first, second = self._attentions
        with self._as_base_model():
            with _replaced(first, _Dense(first, lengths)):
                hidden, residual = self._layers[0](positions, hidden, None)
            if any(each.deeper is not None for each in prompts):
                hidden = hidden + torch.cat([each.added() for each in prompts])
            try:
                with _replaced(second, _Recorder()):
                    self._layers[1](positions, hidden, residual)
            except _Recorded as recorded:
                query, key, value = recorded.inputs
            else:
                raise RuntimeError("the second decoder layer did not call its attention")
        query = query.view(len(hidden), second.num_heads, -1)
        key, value = (each.view(len(hidden), second.num_kv_heads, -1) for each in (key, value))
        split = zip(*(each.split(lengths) for each in (query, key, value)), strict=True)
        return [
            _words_attention(second, prompt, *own)
            for prompt, own in zip(prompts, split, strict=True)
        ]

    @contextmanager
    def _as_base_model(self) -> Iterator[None]:
        """Use the base model's weights only: an adapter would apply to rows of other requests."""
        with ExitStack() as stack:
            for each in self._adapted:
                stack.enter_context(_replaced(each, each.base_layer))
            stack.enter_context(set_forward_context(None, self._config, skip_compiled=True))
            yield


def first_layers(language_model: Any) -> tuple[list[nn.Module], list[Attention]]:
    """Return the first two decoder layers of a model, and the attention of each.

    Raises:
        ValueError: they are not on this pipeline stage, or not of a form that can be used.

    """
    model = getattr(language_model, "model", None)
    layers = getattr(model, "layers", None)
    name = type(language_model).__name__
    if not isinstance(layers, nn.ModuleList) or getattr(model, "start_layer", 0) != 0:
        raise ValueError(f"{name} has no list of decoder layers on this pipeline stage")
    if getattr(model, "end_layer", len(layers)) < LAYERS:
        raise ValueError(f"{name} has fewer than {LAYERS} decoder layers on the first stage")
    used, attentions = list(layers[:LAYERS]), []
    for layer in used:
        own = [each for each in layer.modules() if isinstance(each, Attention)]
        if len(own) != 1 or not _is_plain(own[0]):
            raise ValueError(f"{type(layer).__name__} of {name} has no plain causal attention")
        attentions += own
    return used, attentions


def _is_plain(attention: Attention) -> bool:
    """Return whether a dense causal attention gives the same result."""
    return (
        attention.attn_type == AttentionType.DECODER
        and attention.kv_sharing_target_layer_name is None
        and not attention.has_sink
        and not attention.use_alibi_sqrt
        and getattr(attention.impl, "alibi_slopes", None) is None
        and not getattr(attention.impl, "logits_soft_cap", None)
        and attention.head_size_v == attention.head_size
    )


def pass_bytes(tokens: int, config: Any, item_size: int) -> int:
    """Return an upper bound in bytes on the temporary tensors of one pass.

    Args:
        tokens: number of tokens of all prompts, words included.
        config: configuration of the language model.
        item_size: bytes of a number of the model's dtype.

    """
    width: int = config.hidden_size
    inner: int = getattr(config, "intermediate_size", 4 * width)
    heads: int = config.num_attention_heads
    head: int = getattr(config, "head_dim", None) or width // heads
    rows = 6 * width + 3 * inner + 6 * heads * head
    return tokens * rows * item_size + 3 * 4 * _AT_ONCE


@contextmanager
def _replaced(module: nn.Module, other: Any) -> Iterator[None]:
    """Let a module call ``other`` in place of its own forward inside the block."""
    vars(module)["forward"] = other.forward if isinstance(other, nn.Module) else other
    try:
        yield
    finally:
        vars(module).pop("forward", None)


class _Dense:
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
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device)
            mask = mask.tril().triu(1 - window)
        return scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self._attention.impl.scale,
            enable_gqa=len(query) != len(key),
        )[0]


class _Recorded(Exception):
    """Ends a layer's forward at its attention, with the attention's inputs."""

    def __init__(self, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        super().__init__("recorded")
        self.inputs = inputs


class _Recorder:
    """Ends a layer's forward at its attention."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        raise _Recorded((query, key, value))


def _words_attention(
    attention: Attention, prompt: Prompt, query: Tensor, key: Tensor, value: Tensor
) -> LanguageAttention:
    """Compute the attention of the words after the visual tokens.

    Args:
        attention: the layer's attention, for its scale and window.
        prompt: the prompt.
        query: ``(n, H, d)``.
        key: ``(n, H_kv, d)``.
        value: ``(n, H_kv, d)``.

    """
    first, last = len(prompt.before), len(prompt.before) + len(prompt.visual)
    group = query.shape[1] // key.shape[1]
    keys = key.float().permute(1, 2, 0)
    lengths = value[first:last].float().norm(dim=-1).T.repeat_interleave(group, dim=0)
    device = query.device
    places = torch.arange(len(prompt), device=device)
    means, largest, shares = [], [], []
    rows = max(1, _AT_ONCE // (query.shape[1] * len(prompt)))
    for words in torch.arange(last, len(prompt), device=device).split(rows):
        asked = query[words].float().permute(1, 0, 2)
        logits = torch.matmul(asked.unflatten(0, (-1, group)), keys[:, None]).flatten(0, 1)
        hidden = places > words[:, None]
        if attention.sliding_window is not None:
            hidden |= places <= words[:, None] - attention.sliding_window
        logits = logits.mul_(attention.impl.scale).masked_fill_(hidden, -torch.inf)
        weights = logits.softmax(dim=-1)[:, :, first:last]
        means.append(weights.mean(dim=0))
        read = weights * lengths[:, None]
        largest.append(read.amax(dim=0))
        total = read.sum(dim=2).clamp_min(torch.finfo(torch.float32).tiny)
        shares.append((read.amax(dim=2) / total).amax(dim=0))
    mean, weighted, share = torch.cat(means), torch.cat(largest), torch.cat(shares)
    group_of_ranks = get_tp_group()
    if group_of_ranks.world_size > 1:
        # Every rank has some of the heads, equally many.
        mean = group_of_ranks.all_reduce(mean) / group_of_ranks.world_size
        weighted = group_of_ranks.all_gather(weighted[None], dim=0).amax(dim=0)
        share = group_of_ranks.all_gather(share[None], dim=0).amax(dim=0)
    return LanguageAttention(mean, weighted, share, prompt.question_words)
