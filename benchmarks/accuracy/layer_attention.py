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

    def spread(self, tokens: Tensor, count: int) -> LayerAttention:
        """Return the attention to ``count`` tokens, of which these are some; 0 to the others."""

        def wider(values: Tensor) -> Tensor:
            whole = values.new_zeros(*values.shape[:-1], count)
            return whole.index_copy_(-1, tokens, values)

        return LayerAttention(wider(self.weights), wider(self.values), wider(self.outputs))


def times_ratio(read: Tensor) -> Tensor:
    """Multiply what each head reads, (H, R, N), by its ratio to the mean over the words."""
    return read * read / read.mean(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


@torch.inference_mode()
def attention_of(
    language: Any,
    before: Tensor,
    visual: Tensor,
    after: Tensor,
    passed: int | None = None,
    passing: Tensor | None = None,
    *,
    alone: bool = False,
) -> list[LayerAttention]:
    """Return the attention of the words after the visual tokens, layer by layer.

    Args:
        language: a Llama of Transformers, without its head.
        before: (P, D) embeddings of the words before the picture.
        visual: (N, D) embeddings of the picture.
        after: (R, D) embeddings of the words after it.
        passed: number of layers that the visual tokens pass; later layers get them as they left
            the last of these. None: all layers.
        passing: (M,) int64 ascending, the visual tokens that pass the first layer; attention to the
            others is 0 in later layers. None: all.
        alone: leave the others out of the first layer, too.

    """
    first, count = len(before), len(visual)
    hidden = torch.cat([before, visual, after])[None]
    places = torch.arange(hidden.shape[1])
    kept = torch.arange(count)
    stayed: Tensor | None = None
    found = []
    for index, layer in enumerate(language.layers):
        if passing is not None and index == (0 if alone else 1):
            rows = torch.cat([places[:first], passing + first, places[first + count :]])
            hidden, places, kept = hidden[:, rows], places[rows], passing
        tokens = slice(first, first + len(kept))
        turns = language.rotary_emb(hidden, places[None])
        found.append(_layer(layer, hidden, turns, tokens, len(after)).spread(kept, count))
        if index == passed:
            stayed = hidden[:, tokens].clone()
        ahead = torch.ones(len(places), len(places), dtype=torch.bool).triu(1)
        hidden = layer(
            hidden,
            attention_mask=torch.zeros(ahead.shape).masked_fill(ahead, -torch.inf)[None, None],
            position_embeddings=turns,
        )
        if stayed is not None:
            hidden[:, tokens] = stayed
    return found


def _layer(
    layer: Any, hidden: Tensor, turns: tuple[Tensor, Tensor], visual: slice, words: int
) -> LayerAttention:
    own, normed = layer.self_attn, layer.input_layernorm(hidden)
    query, key, value = (
        project(normed).unflatten(-1, (-1, own.head_dim)).transpose(1, 2)
        for project in (own.q_proj, own.k_proj, own.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *turns)
    group = query.shape[1] // key.shape[1]
    query, key, value = query[0], *(each[0].repeat_interleave(group, 0) for each in (key, value))
    count = key.shape[1]
    logits = query[:, -words:] @ key.mT * own.scaling
    ahead = torch.ones(count, count, dtype=torch.bool).triu(1)[-words:]
    weights = logits.masked_fill(ahead, -torch.inf).softmax(dim=-1)[:, :, visual]
    seen = value[:, visual]
    parts = own.o_proj.weight.unflatten(1, (-1, own.head_dim)).transpose(0, 1)
    return LayerAttention(weights, seen.norm(dim=-1), (seen @ parts.mT).norm(dim=-1))
