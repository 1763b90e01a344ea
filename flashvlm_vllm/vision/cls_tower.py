# SPDX-License-Identifier: Apache-2.0
"""Saliency of InternViT's patches. The pixel shuffle later merges several patches into a token."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather

from flashvlm_vllm.vision.attention import cls_attention
from flashvlm_vllm.vision.clip_siglip import Encoded
from flashvlm_vllm.vision.tap import AttentionTap


class ClsTower:
    """An InternViT that also returns the CLS token's attention to each patch.

    The attention is that of the last layer that vLLM builds, whose output are the features
    (``select_layer``).
    """

    def __init__(self, attention: nn.Module, heads: int, *, is_data_parallel: bool) -> None:
        """Attach to the attention module of the last layer.

        Args:
            attention: vLLM's attention module.
            heads: number of heads in total; a rank may have fewer.
            is_data_parallel: whether each rank encodes some of the tiles.

        Raises:
            TypeError: queries and keys cannot be read from this kind of attention module.

        """
        self._tap = AttentionTap(attention, heads)
        self._is_data_parallel = is_data_parallel

    def run(
        self, encode: Callable[[Tensor], Any], pixel_values: Tensor, *, with_keys: bool = False
    ) -> Encoded:
        """Encode ``B`` tiles or frames, ``(B, 3, H, W)``.

        Args:
            encode: runs the tower on pixels and returns its features.
            pixel_values: in the tower's input size.
            with_keys: whether to return the attention keys too.

        Returns:
            The features from ``encode``; saliency and keys per patch, in raster order, without CLS.

        """

        def read(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
            own = key.contiguous() if with_keys else None
            return cls_attention(query, key, self._tap.scale), own

        with self._tap.listen(read) as captured:
            features: Tensor = encode(pixel_values)
        saliency = self._tap.mean_over_heads(torch.cat([attended for attended, _ in captured]))
        every = [own for _, own in captured if own is not None]
        keys = self._tap.of_all_heads(torch.cat(every), dim=2) if every else None
        if self._is_data_parallel:
            # vLLM pads the shares of the last ranks with tiles that do not exist.
            tiles = len(pixel_values)
            saliency = tensor_model_parallel_all_gather(saliency, dim=0)[:tiles]
            if keys is not None:
                keys = tensor_model_parallel_all_gather(keys.contiguous(), dim=0)[:tiles]
        return Encoded(features, saliency[:, 1:], None if keys is None else keys[:, 1:])
