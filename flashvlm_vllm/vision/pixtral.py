# SPDX-License-Identifier: Apache-2.0
"""Saliency of the Pixtral tower, which takes images of any size, packed into one sequence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import MMEncoderAttention

from flashvlm_vllm.vision.attention import received_attention
from flashvlm_vllm.vision.tap import AttentionTap


@dataclass(frozen=True)
class PackedEncoded:
    """What the tower tells about some images, the patches of each in raster order."""

    result: Any
    saliency: Sequence[Tensor]
    """``(N_i,)`` float32 each."""
    keys: Sequence[Tensor | None]
    """``(N_i, H, d)`` each, where asked for."""


class PixtralTower:
    """A Pixtral tower that also tells how much attention each patch received.

    There is no CLS token. The attention is that of the last layer vLLM built, and of a patch's
    own image only.
    """

    def __init__(self, attention: nn.Module, heads: int) -> None:
        """Listen at ``attention``, the last layer's, of a tower of ``heads`` heads.

        Raises:
            TypeError: the attention is of a kind that does not see queries and keys.

        """
        if not isinstance(attention, MMEncoderAttention):
            raise TypeError(f"cannot read saliency from a {type(attention).__name__}")
        self._tap = AttentionTap(attention)
        self._scale = attention.scale
        self._heads = heads
        self._is_sharded = attention.num_heads != heads

    def run(
        self, encode: Callable[[], Any], patches: Sequence[int], *, with_keys: bool = False
    ) -> PackedEncoded:
        """Encode images.

        Args:
            encode: runs the tower on all images at once.
            patches: how many each image has.
            with_keys: whether to return the keys as well.

        """
        with self._tap.listen() as heard:
            result = encode()
        (attention,) = heard
        sizes = list(patches)
        queries, keys = attention.query.split(sizes, dim=1), attention.key.split(sizes, dim=1)
        saliency = torch.cat(
            [
                received_attention(query, key, self._scale)[0]
                for query, key in zip(queries, keys, strict=True)
            ]
        )
        together = attention.key[0]
        if self._is_sharded:
            # Each rank holds some of the heads.
            saliency = tensor_model_parallel_all_reduce(saliency)
            if with_keys:
                together = tensor_model_parallel_all_gather(together.contiguous(), dim=1)
        return PackedEncoded(
            result,
            (saliency / self._heads).split(sizes),
            together.split(sizes) if with_keys else [None] * len(sizes),
        )
