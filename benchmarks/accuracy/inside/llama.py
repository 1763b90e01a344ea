# SPDX-License-Identifier: Apache-2.0
"""A Llama of `transformers`, one layer at a time, so that tokens can leave between two layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from flashvlm_vllm.selection.arguments import check_tensor


class Prompt(NamedTuple):
    """Positions of the parts of a sequence of embeddings, counted from 0.

    Attributes:
        start: of the image.
        stop: behind the image, where the text starts that asks about it.
        length: of the prompt; what follows was generated.
    """

    start: int
    stop: int
    length: int


class Llama:
    """The language model in a LLaVA, or one on its own, for one sequence without padding.

    Tokens see themselves and those before them **in the sequence**; their position ids only
    decide the rotation. So a sequence from which tokens have left needs no mask of its own.
    """

    def __init__(self, model: Any) -> None:
        self.decoder = model.get_decoder()
        self.head = model.get_output_embeddings()
        self.layers = self.decoder.layers

    def layer(self, index: int, hidden: Tensor, positions: Tensor) -> Tensor:
        """Run one layer.

        Args:
            index: of the layer, from 0.
            hidden: (T, D), what goes into it.
            positions: (T,) int64 position ids.

        Returns:
            (T, D), what comes out.
        """
        count = hidden.shape[0]
        mask = torch.full((count, count), -torch.inf, dtype=hidden.dtype, device=hidden.device)
        rotation = self.decoder.rotary_emb(hidden[None], position_ids=positions[None])
        output: Tensor = self.layers[index](
            hidden[None],
            attention_mask=mask.triu(diagonal=1)[None, None],
            position_embeddings=rotation,
        )
        return output[0]

    def attention(self, index: int, hidden: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """Return the attention of some tokens to all others in one layer, mean over its heads.

        Args:
            index: of the layer, from 0.
            hidden: (T, D), what goes into it.
            positions: (T,) int64 position ids.
            rows: (R,) int64 places of those tokens in the sequence.

        Returns:
            (R, T) float32; every row sums to 1 and is 0 behind its own place.
        """
        layer = self.layers[index]
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden[None])

        def heads(projected: Tensor) -> Tensor:
            return projected.view(1, hidden.shape[0], -1, attention.head_dim).transpose(1, 2)

        rotation = self.decoder.rotary_emb(hidden[None], position_ids=positions[None])
        queries, keys = apply_rotary_pos_emb(
            heads(attention.q_proj(normed)), heads(attention.k_proj(normed)), *rotation
        )
        queries = queries[0].index_select(1, rows)
        keys = repeat_kv(keys, attention.num_key_value_groups)[0]
        logits = (queries @ keys.transpose(1, 2) * attention.scaling).float()
        places = torch.arange(hidden.shape[0], device=hidden.device)
        logits = logits.masked_fill(places > rows[:, None], -torch.inf)
        return torch.softmax(logits, dim=-1).mean(dim=0)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits after the last token.

        Args:
            hidden: (T, D) out of the last layer.

        Returns:
            (vocabulary,)
        """
        scores: Tensor = self.head(self.decoder.norm(hidden[-1:]))
        return scores[0]


def locate(inputs_embeds: Tensor, visual: slice, prompt: int | None) -> Prompt:
    """Check where image and text are.

    Args:
        inputs_embeds: (S, D), any float dtype.
        visual: the image's tokens, at least one, not the prompt's last.
        prompt: how many of the S are the prompt; None: all.

    Returns:
        The same as numbers.

    Raises:
        TypeError: `inputs_embeds` is not floating point.
        ValueError: its shape is no (S, D), the prompt is longer than S, or the image is empty, has
            gaps or does not end before the prompt does.
    """
    check_tensor("inputs_embeds", inputs_embeds, ("S", "D"), like=inputs_embeds)
    length = inputs_embeds.shape[0] if prompt is None else prompt
    if not 1 <= length <= inputs_embeds.shape[0]:
        raise ValueError(f"prompt is {prompt}; allowed: 1 to {inputs_embeds.shape[0]}")
    start, stop, _ = visual.indices(length)
    if not start < stop < length or visual not in (slice(start, stop), slice(start, stop, 1)):
        raise ValueError(
            f"visual is {visual}; allowed: tokens next to each other, with text behind them, in a "
            f"prompt of {length}"
        )
    return Prompt(start, stop, length)
