# SPDX-License-Identifier: Apache-2.0
"""What words attend to in each layer of a Llama, on Transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


@dataclass(frozen=True)
class LayerAttention:
    """Attention of R words to the N visual tokens in one layer, head by head."""

    weights: Tensor
    """(H, R, N) float32, softmax over all tokens that a word sees."""
    values: Tensor
    """(H, N) lengths of the value vectors."""
    outputs: Tensor
    """(H, N) lengths of the value vectors after the head's part of the output projection."""

    @property
    def read(self) -> Tensor:
        """Attention times the length of the value vector, (H, R, N)."""
        return self.weights * self.values[:, None]


def times_ratio(read: Tensor) -> Tensor:
    """Multiply what each head reads, (H, R, N), by its ratio to the mean over the words."""
    return read * read / read.mean(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


@torch.inference_mode()
def attention_of(
    language: Any, before: Tensor, visual: Tensor, after: Tensor, passed: int | None = None
) -> list[LayerAttention]:
    """Return the attention of the words after the visual tokens, layer by layer.

    Args:
        language: a Llama of Transformers, without its head.
        before: (P, D) embeddings of the words before the picture.
        visual: (N, D) embeddings of the picture.
        after: (R, D) embeddings of the words after it.
        passed: number of layers that the visual tokens pass; later layers get them as they left
            the last of these. None: all layers.

    """
    inputs: list[Tensor] = []
    first, last = len(before), len(before) + len(visual)

    def stay(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = given[0]
        if passed is not None and len(inputs) > passed:
            hidden = hidden.clone()
            hidden[:, first:last] = inputs[passed][:, first:last]
        inputs.append(hidden)
        return hidden, *given[1:]

    hooks = [layer.register_forward_pre_hook(stay) for layer in language.layers]
    embeddings = torch.cat([before, visual, after])[None]
    try:
        language(inputs_embeds=embeddings, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    count = embeddings.shape[1]
    turns = language.rotary_emb(embeddings, torch.arange(count)[None])
    return [
        _layer(layer, hidden, turns, slice(first, last), len(after))
        for layer, hidden in zip(language.layers, inputs, strict=True)
    ]


def _layer(
    layer: Any, hidden: Tensor, turns: tuple[Tensor, Tensor], visual: slice, words: int
) -> LayerAttention:
    own, normed = layer.self_attn, layer.input_layernorm(hidden)
    query, key, value = (
        project(normed).unflatten(-1, (-1, own.head_dim)).transpose(1, 2)
        for project in (own.q_proj, own.k_proj, own.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *turns)
    query, key, value = query[0], key[0], value[0]
    count = key.shape[1]
    logits = query[:, -words:] @ key.mT * own.scaling
    ahead = torch.ones(count, count, dtype=torch.bool).triu(1)[-words:]
    weights = logits.masked_fill(ahead, -torch.inf).softmax(dim=-1)[:, :, visual]
    seen = value[:, visual]
    parts = own.o_proj.weight.unflatten(1, (-1, own.head_dim)).transpose(0, 1)
    return LayerAttention(weights, seen.norm(dim=-1), (seen @ parts.mT).norm(dim=-1))
