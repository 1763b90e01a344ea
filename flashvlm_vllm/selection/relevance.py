# SPDX-License-Identifier: Apache-2.0
"""Extrinsic query relevance: how well each visual token matches the question (eq 2 to 6)."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from flashvlm_vllm.selection.config import QueryGate, SelectionConfig
from flashvlm_vllm.selection.padding import Padding
from flashvlm_vllm.selection.scaling import min_max, row_norms, unit_rows

LOWEST_COSINE: Final = -1.0


def query_relevance(
    image_features: Tensor,
    text_embeds: Tensor,
    config: SelectionConfig,
    tokens: Padding | None = None,
    words: Padding | None = None,
) -> Tensor:
    """Relevance of every visual token to the question, eq 2 to 6 in order.

    Args:
        image_features: (..., N, D) visual tokens in the language model's space, any float dtype.
        text_embeds: (..., L, D) raw input embeddings of the question, L >= 1, any float dtype.
        config: temperatures, power and gates.
        tokens: which visual tokens of a batch are real; None: all.
        words: which words of a batch are real; None: all. Padding must be zeros.

    Returns:
        (..., N) float32 in [0, 1].
    """
    text = gated_text(text_embeds, config.query_gate, config.epsilon)
    similarity = text_similarity(image_features, text)
    relevance = aggregate(similarity, config.aggregation_temperature, words)
    if config.sharpening:
        relevance = sharpen(
            relevance,
            config.sharpening_temperature,
            config.sharpening_power,
            config.epsilon,
            tokens,
        )
        relevance = attenuate_below_gate(
            relevance, config.gate_fraction, config.attenuation, tokens
        )
    return min_max(relevance, config.epsilon, tokens)


def gated_text(text_embeds: Tensor, mode: QueryGate, epsilon: float) -> Tensor:
    """Eq 3: text vectors weighted by ``g_j = |e_j| / (max_k |e_k| + epsilon)``.

    The assumption is that embeddings of content words are longer than those of function words.
    Whether the gate has an effect depends on where vectors are normalised to unit length; see
    `SelectionConfig.query_gate`.

    Args:
        text_embeds: (..., L, D) raw token embeddings, any float dtype.
        mode: where the gate is applied.
        epsilon: added to the largest norm.

    Returns:
        (..., L, D) float32; unit length, times the gate for ``scaled``.
    """
    text = text_embeds.float()
    if mode == "scaled":
        return norm_gate(text, epsilon) * unit_rows(text)
    if mode == "normalized_last":
        return unit_rows(norm_gate(text, epsilon) * text)
    if mode == "normalized_first":
        text = unit_rows(text)
        return norm_gate(text, epsilon) * text
    return unit_rows(text)


def norm_gate(text: Tensor, epsilon: float) -> Tensor:
    """The gate of eq 3.

    Args:
        text: (..., L, D) float32.
        epsilon: added to the largest norm.

    Returns:
        (..., L, 1) float32 in [0, 1).
    """
    norms: Tensor = torch.linalg.vector_norm(text, dim=-1, keepdim=True)
    # One non-finite embedding would make the maximum, and so every gate, non-finite.
    norms = norms.nan_to_num(nan=0.0, posinf=0.0)
    return norms / (norms.amax(dim=-2, keepdim=True) + epsilon)


def text_similarity(image_features: Tensor, text: Tensor) -> Tensor:
    """Eq 2 and 4: dot products of unit visual tokens with the gated text vectors.

    A token with a NaN or an infinity matches nothing: its products become the lowest cosine, so
    that a non-finite patch or word does not affect the softmax of the others.

    Args:
        image_features: (..., N, D), any float dtype.
        text: (..., L, D) float32 from `gated_text`.

    Returns:
        (..., N, L) float32 in [-1, 1].
    """
    image_features = image_features.float()
    # Divided after the product: N x L numbers instead of a second N x D copy of the image.
    similarity = image_features @ text.mT / row_norms(image_features)
    return similarity.nan_to_num(nan=LOWEST_COSINE, posinf=LOWEST_COSINE, neginf=LOWEST_COSINE)


def aggregate(similarity: Tensor, temperature: float, words: Padding | None = None) -> Tensor:
    """Eq 5: one score per visual token, a softmax-weighted mean over the words.

    Args:
        similarity: (..., N, L), finite.
        temperature: tau; the result approaches the maximum for 0 and the mean for infinity.
        words: which words of a batch are real; None: all.

    Returns:
        (..., N); NaN for an item without words.
    """
    logits = similarity / temperature
    if words is not None:
        logits = logits.masked_fill(~words.valid[..., None, :], -torch.inf)
    weights = torch.softmax(logits, dim=-1)
    return (weights * similarity).sum(dim=-1)


def sharpen(
    relevance: Tensor,
    temperature: float,
    power: float,
    epsilon: float,
    tokens: Padding | None = None,
) -> Tensor:
    """Contrastive sharpening of section 3.1: softmax over the visual tokens, power, min-max.

    Before the final min-max this equals ``exp(power / temperature * (s_i - max s))``, so with the
    published constants a similarity 0.01 below the best one gets exp(-2.5) = 8 % of its weight. The
    steps are kept separate as published; in float16 they would underflow, so scores are float32.

    Args:
        relevance: (..., N) aggregated similarity.
        temperature: of the softmax.
        power: exponent on the softmax weights.
        epsilon: of the min-max.
        tokens: which tokens of a batch are real; None: all.

    Returns:
        (..., N) in [0, 1].
    """
    logits = relevance / temperature
    if tokens is not None:
        logits = logits.masked_fill(~tokens.valid, -torch.inf)
    weights = torch.softmax(logits, dim=-1)
    return min_max(weights**power, epsilon, tokens)


def attenuate_below_gate(
    relevance: Tensor, gate_fraction: float, attenuation: float, tokens: Padding | None = None
) -> Tensor:
    """Eq 6, first half: scale down everything below the (1 - gate_fraction) quantile.

    Args:
        relevance: (..., N) sharpened relevance.
        gate_fraction: share that passes unchanged. With 0.005 and no ties: 3 of 576, 11 of 2048.
        attenuation: factor on the rest.
        tokens: which tokens of a batch are real; None: all.

    Returns:
        (..., N); the caller rescales.
    """
    threshold = quantile(relevance, 1.0 - gate_fraction, tokens)
    return torch.where(relevance >= threshold, relevance, attenuation * relevance)


def quantile(values: Tensor, share: float, tokens: Padding | None = None) -> Tensor:
    """Quantile with linear interpolation between the two neighbouring order statistics.

    Implemented here because `torch.quantile` has an upper limit on N. The two positions depend on N
    alone, so there is no synchronization with the device.

    Args:
        values: (..., N), N >= 1.
        share: in [0, 1].
        tokens: which values of a batch are real, at least one of each item; None: all.

    Returns:
        (..., 1).
    """
    if tokens is None:
        ascending = torch.sort(values, dim=-1).values
        position = share * (values.shape[-1] - 1)
        below, above = math.floor(position), math.ceil(position)
        return torch.lerp(
            ascending[..., below : below + 1], ascending[..., above : above + 1], position - below
        )
    ascending = torch.sort(values.masked_fill(~tokens.valid, torch.inf), dim=-1).values
    # In float64, as on the host, so that the positions are exactly the same.
    positions = share * (tokens.counts[:, None] - 1).double()
    floors = positions.floor()
    return torch.lerp(
        ascending.gather(-1, floors.long()),
        ascending.gather(-1, positions.ceil().long()),
        (positions - floors).to(values.dtype),
    )
