# SPDX-License-Identifier: Apache-2.0
"""Attention weights that a fused kernel does not return, computed exactly from q and k.

On a CPU each image is computed by itself: a product of several is a product of another shape, which
BLAS rounds otherwise, and the last bits of two nearly equal scores decide which tokens Algorithm 1
leaves. An image would then keep other tokens under load than on a quiet server. It costs nothing
there; a GPU would wait for the launches.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, float], Tensor]

_QUERY_BLOCK = 128
"""Queries handled at once, instead of a full map."""


def cls_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention of the CLS token (position 0), summed over heads.

    A kernel of its own would bring nothing: one query per head reads every key once, O(T d), and
    is a few launches behind a layer of dozens.

    Args:
        query, key: ``(B, T, H, d)``, any float dtype; weights are computed in float32.
        scale: factor on the logits, ``1 / sqrt(d)`` as a rule.

    Returns:
        ``(B, T)`` float32, CLS included; divide by the number of heads for the mean of eq. 1.

    """
    return _cls(query, key, scale) if query.is_cuda else _of_each(_cls, query, key, scale)


def _cls(query: Tensor, key: Tensor, scale: float) -> Tensor:
    logits = torch.einsum("bhd,bthd->bht", query[:, 0].float(), key.float()) * scale
    return logits.softmax(dim=-1).sum(dim=1)


def received_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention that each token receives from all tokens, summed over queries and heads.

    For towers without CLS (as the released Qwen code reads eq. 1). On CUDA by two fused kernels,
    where triton is installed; elsewhere image by image, by blocks of queries.

    Args:
        query, key: ``(B, T, H, d)``, any float dtype; weights are computed in float32.
        scale: factor on the logits.

    Returns:
        ``(B, T)`` float32.

    """
    if query.is_cuda and (fused := _fused()) is not None:
        return fused(query, key, scale)
    return _of_each(_received, query, key, scale)


def _received(query: Tensor, key: Tensor, scale: float) -> Tensor:
    tokens = query.shape[1]
    key = key.float().permute(0, 2, 3, 1)
    received = query.new_zeros(query.shape[0], tokens, dtype=torch.float32)
    for start in range(0, tokens, _QUERY_BLOCK):
        block = query[:, start : start + _QUERY_BLOCK].float().transpose(1, 2)
        received += (block @ key * scale).softmax(dim=-1).sum(dim=(1, 2))
    return received


def _of_each(attend: Attention, query: Tensor, key: Tensor, scale: float) -> Tensor:
    parts = zip(query.split(1), key.split(1), strict=True)
    return torch.cat([attend(*part, scale) for part in parts])


def _fused() -> Attention | None:
    try:
        from flashvlm_vllm.vision.received_kernel import received_attention_fused
    except ImportError:
        return None
    return received_attention_fused
