# SPDX-License-Identifier: Apache-2.0
"""Reads which visual tokens the words of a prompt attend to in the second and third decoder layer.

The first decoder layer runs on the words of a prompt and on every visual token of its item, or on
half of them (`Prompt.passing`); all visual tokens give it keys and values. The second layer runs
on the words only: the visual tokens stay as the first layer left them, and give the second and the
third layer their keys and values. What the two layers find this way, and what less would find, is
in ``benchmarks/language_attention``.

The layers are those of the loaded model, called as vLLM calls them: quantized weights, norms and
rotary embeddings of any kind are their own. Only the paged attention between them is replaced by a
dense one, which needs no KV cache.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.forward_context import set_forward_context
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType

from flashvlm_vllm.selection import LanguageAttention
from flashvlm_vllm.worker import dense_attention
from flashvlm_vllm.worker.dense_attention import (
    Dense,
    Tokens,
    hidden_tokens,
    inputs_of,
    replaced,
    rows_at_once,
)
from flashvlm_vllm.worker.item_prompt import Carried, Prompt, in_row

LAYERS: Final = 3
"""Decoder layers that are used: the first whole, the others for the words that attend in them."""


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
        carried = [each.carried() for each in prompts]
        lengths = [len(each) for each in carried]
        rows = in_row([each.places for each in carried], [len(each) for each in prompts])
        words = in_row([each.words() for each in carried], lengths)
        positions = torch.cat([each.all_positions() for each in prompts], dim=1)
        if len(positions) == 1:
            positions = positions[0]
        found = []
        with self._as_base_model():
            state = self._after_first_layer(prompts, carried, positions, rows)
            positions = positions[..., rows]
            for layer, attention in zip(self._layers[1:], self._attentions[1:], strict=True):
                inputs = _split(inputs_of(attention, layer, positions, state), lengths)
                found.append(
                    [
                        _words_attention(attention, tokens, *own)
                        for tokens, own in zip(carried, inputs, strict=True)
                    ]
                )
                if layer is self._layers[-1]:
                    break
                visual = [
                    Tokens(tokens.places[tokens.image], key[tokens.image], value[tokens.image])
                    for tokens, (_, key, value) in zip(carried, inputs, strict=True)
                ]
                asking = [each.places[each.words()] for each in carried]
                with replaced(attention, Dense(attention, asking, visual)):
                    hidden, residual = layer(positions[..., words], state[words], None)
                state[words] = hidden + residual
        return [
            _of_all_heads(layers, prompt)
            for prompt, layers in zip(prompts, zip(*found, strict=True), strict=True)
        ]

    def _after_first_layer(
        self,
        prompts: Sequence[Prompt],
        carried: Sequence[Carried],
        positions: Tensor,
        rows: Tensor,
    ) -> Tensor:
        """Return the state of the tokens that pass the first layer, ``(n, D)``."""
        layer, attention = self._layers[0], self._attentions[0]
        embeddings = torch.cat([each.embeddings() for each in prompts])
        others = _left_out(attention, layer, prompts, positions, embeddings)
        with replaced(attention, Dense(attention, [each.places for each in carried], others)):
            hidden, residual = layer(positions[..., rows], embeddings[rows], None)
        if any(each.deeper is not None for each in prompts):
            hidden = hidden + torch.cat([each.added() for each in prompts])[rows]
        state: Tensor = hidden + residual
        return state

    @contextmanager
    def _as_base_model(self) -> Iterator[None]:
        """Use the base model's weights only: an adapter would apply to rows of other requests."""
        with ExitStack() as stack:
            for each in self._adapted:
                stack.enter_context(replaced(each, each.base_layer))
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
    return tokens * rows * item_size + 3 * 4 * dense_attention.AT_ONCE


def _left_out(
    attention: Attention,
    layer: nn.Module,
    prompts: Sequence[Prompt],
    positions: Tensor,
    embeddings: Tensor,
) -> list[Tokens] | None:
    """Return keys and values of the visual tokens that do not pass the first layer, if any."""
    places = [each.left_out() for each in prompts]
    if not any(map(len, places)):
        return None
    rows = in_row(places, [len(each) for each in prompts])
    inputs = inputs_of(attention, layer, positions[..., rows], embeddings[rows])
    every = zip(places, _split(inputs, [len(each) for each in places]), strict=True)
    return [Tokens(own, key, value) for own, (_, key, value) in every]


def _split(
    inputs: tuple[Tensor, Tensor, Tensor], lengths: Sequence[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the inputs of an attention prompt by prompt."""
    return list(zip(*(each.split(list(lengths)) for each in inputs), strict=True))


def _words_attention(
    attention: Attention, tokens: Carried, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Compute how this rank's heads attend from the words after the visual tokens to these.

    Args:
        attention: the layer's attention, for its scale and window.
        tokens: of the prompt, M visual ones.
        query: ``(m, H, d)``.
        key: ``(m, H_kv, d)``.
        value: ``(m, H_kv, d)``.

    Returns:
        ``(2, R, M)`` float32, means over the heads of `LanguageAttention`'s ``mean`` and ``read``.

    """
    lengths = value[tokens.image].float().norm(dim=-1).T
    lengths = lengths.repeat_interleave(query.shape[1] // key.shape[1], dim=0)
    total = torch.zeros_like(lengths)
    for weights in _weights(attention, tokens, query, key):
        total += weights.sum(dim=1)
    usual = total.div_(len(tokens) - tokens.image.stop)
    usual.clamp_min_(torch.finfo(torch.float32).tiny)
    means = [
        torch.stack(
            [weights.mean(dim=0), (weights.square() * (lengths / usual)[:, None]).mean(dim=0)]
        )
        for weights in _weights(attention, tokens, query, key)
    ]
    return torch.cat(means, dim=1)


def _weights(attention: Attention, tokens: Carried, query: Tensor, key: Tensor) -> Iterator[Tensor]:
    """Yield attention weights of the words after the visual tokens to these, some words at a time.

    Args:
        attention: the layer's attention, for its scale and window.
        tokens: of the prompt, M visual ones.
        query: ``(m, H, d)``.
        key: ``(m, H_kv, d)``.

    Yields:
        ``(H, words, M)`` float32, softmax over all tokens that a word sees.

    """
    group = query.shape[1] // key.shape[1]
    keys = key.float().permute(1, 2, 0)
    asking = slice(tokens.image.stop, None)
    at_once = rows_at_once(query.shape[1], len(tokens))
    for own, places in zip(
        query[asking].split(at_once), tokens.places[asking].split(at_once), strict=True
    ):
        asked = own.float().permute(1, 0, 2)
        logits = torch.matmul(asked.unflatten(0, (-1, group)), keys[:, None]).flatten(0, 1)
        hidden = hidden_tokens(attention, places, tokens.places)
        logits = logits.mul_(attention.impl.scale).masked_fill_(hidden, -torch.inf)
        yield logits.softmax(dim=-1)[:, :, tokens.image]


def _of_all_heads(layers: Sequence[Tensor], prompt: Prompt) -> LanguageAttention:
    """Return the attention in the second and third layer, from each rank's share of the heads."""
    means = torch.stack(list(layers))
    ranks = get_tp_group()
    if ranks.world_size > 1:
        # Every rank has equally many heads.
        means = ranks.all_reduce(means) / ranks.world_size
    every = means.new_zeros(*means.shape[:3], len(prompt.visual))
    every.index_copy_(3, prompt.passing, means)
    return LanguageAttention(every[0, 0], every[:, 1], prompt.question_words)
