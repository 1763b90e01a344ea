# SPDX-License-Identifier: Apache-2.0
"""Attention weights that a fused kernel does not return, computed exactly from q and k."""

import torch
from torch import Tensor

_QUERY_BLOCK = 128
"""Queries handled at once: bounds memory to heads x 128 x tokens instead of a full map."""


def cls_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention of the CLS token (position 0), summed over heads.

    Args:
        query, key: ``(B, T, H, d)``, any float dtype; weights are computed in float32.
        scale: factor on the logits, ``1 / sqrt(d)`` as a rule.

    Returns:
        ``(B, T)`` float32, CLS included; divide by the number of heads for the mean of eq. 1.

    """
    logits = torch.einsum("bhd,bthd->bht", query[:, 0].float(), key.float()) * scale
    return logits.softmax(dim=-1).sum(dim=1)


def received_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention that each token receives from all tokens, summed over queries and heads.

    For towers without CLS (as the released Qwen code reads eq. 1).

    Args:
        query, key: ``(B, T, H, d)``, any float dtype; weights are computed in float32.
        scale: factor on the logits.

    Returns:
        ``(B, T)`` float32.

    """
    tokens = query.shape[1]
    key = key.float().permute(0, 2, 3, 1)
    received = query.new_zeros(query.shape[0], tokens, dtype=torch.float32)
    for start in range(0, tokens, _QUERY_BLOCK):
        block = query[:, start : start + _QUERY_BLOCK].float().transpose(1, 2)
        received += (block @ key * scale).softmax(dim=-1).sum(dim=(1, 2))
    return received
