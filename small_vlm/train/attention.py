# SPDX-License-Identifier: Apache-2.0
"""Attention of packed branches: causal over the prefix, masked for the branches only.

The mask of a whole pass is mostly the causal triangle of the prefix, which needs no mask. Without
it a training step takes less than half the time on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PACKED: Final = "packed branches"
"""Name of this attention in a model's configuration."""


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Attend as `transformers` asks of an attention function.

    Args:
        module: the attention layer.
        query: ``(B, H, P + S, d)``: a prefix of P tokens, and branches of S.
        key: the same shape; a prefix's padding comes last, where causal attention does not see it.
        value: the same shape.
        attention_mask: ``(B, 1, S, P + S)``, added to the logits of the branches.
        scaling: of the logits.
        ignored: what is the same for all layers here.

    Returns:
        ``(B, P + S, H, d)``, and no weights.

    """
    prefix = query.shape[2] - attention_mask.shape[2]
    first, keys, values = (each[:, :, :prefix] for each in (query, key, value))
    seen = scaled_dot_product_attention(first, keys, values, is_causal=True, scale=scaling)
    logits = query[:, :, prefix:] @ key.mT * scaling + attention_mask
    asked = logits.softmax(dim=-1) @ value
    return torch.cat([seen, asked], dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(PACKED, attend)


@contextmanager
def packed_attention(language: Any) -> Iterator[None]:
    """Let a language model of `transformers` attend this way inside the block."""
    config = language.config
    before = config._attn_implementation
    config._attn_implementation = PACKED
    try:
        yield
    finally:
        config._attn_implementation = before
