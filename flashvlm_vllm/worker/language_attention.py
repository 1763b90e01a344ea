# SPDX-License-Identifier: Apache-2.0
"""Reads which visual tokens the words of a prompt attend to in the second and third decoder layer.

The first decoder layer runs on all tokens of an item and on its prompt's words. The second runs on
the words only: the visual tokens stay as the first layer left them, and give the second and the
third layer their keys and values. The words' own states are those of the prefill up to there, and
the two layers find what they would find with all tokens (``benchmarks/language_attention``).

The layers are those of the loaded model, called as vLLM calls them: quantized weights, norms and
rotary embeddings of any kind are their own. Only the paged attention between them is replaced by a
dense one, which needs no KV cache.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from traceback import clear_frames
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

LAYERS: Final = 3
"""Decoder layers that are used: the first whole, the others for the words that attend in them."""
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
        positions = torch.cat([each.all_positions() for each in prompts], dim=1)
        if len(positions) == 1:
            positions = positions[0]
        words = _word_rows(prompts, positions.device)
        found = []
        with self._as_base_model():
            state = self._after_first_layer(prompts, positions)
            for layer, attention in zip(self._layers[1:], self._attentions[1:], strict=True):
                inputs = _split(_inputs_of(attention, layer, positions, state), lengths)
                found.append(
                    [
                        _words_attention(attention, prompt, *own)
                        for prompt, own in zip(prompts, inputs, strict=True)
                    ]
                )
                if layer is self._layers[-1]:
                    break
                with _replaced(attention, _DenseOfWords(attention, prompts, inputs)):
                    hidden, residual = layer(positions[..., words], state[words], None)
                state[words] = hidden + residual
        return [
            _of_all_heads(layers, prompt)
            for prompt, layers in zip(prompts, zip(*found, strict=True), strict=True)
        ]

    def _after_first_layer(self, prompts: Sequence[Prompt], positions: Tensor) -> Tensor:
        """Return the state of all tokens after the first layer, ``(n, D)``."""
        embeddings = torch.cat([each.embeddings() for each in prompts])
        dense = _Dense(self._attentions[0], [len(each) for each in prompts])
        with _replaced(self._attentions[0], dense):
            hidden, residual = self._layers[0](positions, embeddings, None)
        if any(each.deeper is not None for each in prompts):
            hidden = hidden + torch.cat([each.added() for each in prompts])
        state: Tensor = hidden + residual
        return state

    @contextmanager
    def _as_base_model(self) -> Iterator[None]:
        """Use the base model's weights only: an adapter would apply to rows of other requests."""
        with ExitStack() as stack:
            for each in self._adapted:
                stack.enter_context(_replaced(each, each.base_layer))
            stack.enter_context(set_forward_context(None, self._config, skip_compiled=True))
            yield


def first_layers(language_model: Any) -> tuple[list[nn.Module], list[Attention]]:
    """Return the first `LAYERS` decoder layers of a model, and the attention of each.

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
    rows = 8 * width + 3 * inner + 8 * heads * head
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


class _DenseOfWords:
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
        rows = _word_rows([prompt], query.device)
        outputs = [
            scaled_dot_product_attention(
                some.transpose(0, 1)[None],
                keys,
                values,
                attn_mask=~_hidden(self._attention, words, len(prompt)),
                scale=self._attention.impl.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )[0].transpose(0, 1)
            for some, words in zip(
                *(each.split(_rows_at_once(query.shape[1], prompt)) for each in (query, rows)),
                strict=True,
            )
        ]
        return torch.cat(outputs)


def _rows_at_once(heads: int, prompt: Prompt) -> int:
    """Return how many rows of a prompt attend at a time."""
    return max(1, _AT_ONCE // (heads * len(prompt)))


def _word_rows(prompts: Sequence[Prompt], device: torch.device) -> Tensor:
    """Return the places of all words in prompts that lie one after another, int64."""
    rows, start = [], 0
    for each in prompts:
        end, visual = start + len(each), start + len(each.before)
        rows += [
            torch.arange(start, visual, device=device),
            torch.arange(visual + len(each.visual), end, device=device),
        ]
        start = end
    return torch.cat(rows)


def _hidden(attention: Attention, rows: Tensor, length: int) -> Tensor:
    """Return which of the tokens of a prompt some of its rows do not see, ``(rows, length)``."""
    places = torch.arange(length, device=rows.device)
    hidden = places > rows[:, None]
    if attention.sliding_window is not None:
        hidden |= places <= rows[:, None] - attention.sliding_window
    return hidden


def _inputs_of(
    attention: Attention, layer: nn.Module, positions: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query ``(n, H, d)``, key and value ``(n, H_kv, d)`` at a layer's attention."""
    try:
        with _replaced(attention, _Recorder()):
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


def _split(
    inputs: tuple[Tensor, Tensor, Tensor], lengths: Sequence[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the inputs of an attention prompt by prompt."""
    return list(zip(*(each.split(list(lengths)) for each in inputs), strict=True))


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
) -> Tensor:
    """Compute how this rank's heads attend from the words after the visual tokens to these.

    Args:
        attention: the layer's attention, for its scale and window.
        prompt: the prompt.
        query: ``(n, H, d)``.
        key: ``(n, H_kv, d)``.
        value: ``(n, H_kv, d)``.

    Returns:
        ``(2, R, N)`` float32, means over the heads of `LanguageAttention`'s ``mean`` and ``read``.

    """
    visual = slice(len(prompt.before), len(prompt.before) + len(prompt.visual))
    lengths = value[visual].float().norm(dim=-1).T
    lengths = lengths.repeat_interleave(query.shape[1] // key.shape[1], dim=0)
    total = torch.zeros_like(lengths)
    for weights in _weights(attention, prompt, query, key):
        total += weights.sum(dim=1)
    usual = total.div_(len(prompt.after)).clamp_min_(torch.finfo(torch.float32).tiny)
    means = [
        torch.stack(
            [weights.mean(dim=0), (weights.square() * (lengths / usual)[:, None]).mean(dim=0)]
        )
        for weights in _weights(attention, prompt, query, key)
    ]
    return torch.cat(means, dim=1)


def _weights(attention: Attention, prompt: Prompt, query: Tensor, key: Tensor) -> Iterator[Tensor]:
    """Yield attention weights of the words after the visual tokens to these, some words at a time.

    Args:
        attention: the layer's attention, for its scale and window.
        prompt: the prompt.
        query: ``(n, H, d)``.
        key: ``(n, H_kv, d)``.

    Yields:
        ``(H, words, N)`` float32, softmax over all tokens that a word sees.

    """
    first, last = len(prompt.before), len(prompt.before) + len(prompt.visual)
    group = query.shape[1] // key.shape[1]
    keys = key.float().permute(1, 2, 0)
    rows = torch.arange(last, len(prompt), device=query.device)
    for words in rows.split(_rows_at_once(query.shape[1], prompt)):
        asked = query[words].float().permute(1, 0, 2)
        logits = torch.matmul(asked.unflatten(0, (-1, group)), keys[:, None]).flatten(0, 1)
        hidden = _hidden(attention, words, len(prompt))
        logits = logits.mul_(attention.impl.scale).masked_fill_(hidden, -torch.inf)
        yield logits.softmax(dim=-1)[:, :, first:last]


def _of_all_heads(layers: Sequence[Tensor], prompt: Prompt) -> LanguageAttention:
    """Return the attention in the second and third layer, from each rank's share of the heads."""
    means = torch.stack(list(layers))
    ranks = get_tp_group()
    if ranks.world_size > 1:
        # Every rank has equally many heads.
        means = ranks.all_reduce(means) / ranks.world_size
    return LanguageAttention(means[0, 0], means[:, 1], prompt.question_words)
