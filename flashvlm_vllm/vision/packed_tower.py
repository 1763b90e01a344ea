# SPDX-License-Identifier: Apache-2.0
"""Saliency of the Pixtral tower, which takes images of any size, packed into one sequence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashvlm_vllm.vision.attention import received_attention
from flashvlm_vllm.vision.tap import AttentionTap


@dataclass(frozen=True)
class PackedEncoded:
    """Output of the tower for some images. The patches of each image are in raster order."""

    result: Any
    saliency: Sequence[Tensor]
    """``(N_i,)`` float32 per image."""
    keys: Sequence[Tensor | None]
    """``(N_i, H, d)`` attention keys per image, if requested."""


class PixtralTower:
    """A Pixtral tower that also returns how much attention each patch received.

    There is no CLS token. The attention is that of the last layer that vLLM builds, from patches of
    the same image.
    """

    def __init__(self, attention: nn.Module, heads: int) -> None:
        """Attach to the attention module of the last layer, of a tower with ``heads`` heads.

        Raises:
            TypeError: queries and keys cannot be read from this kind of attention module.

        """
        self._tap = AttentionTap(attention, heads)

    def run(
        self, encode: Callable[[], Any], patches: Sequence[int], *, with_keys: bool = False
    ) -> PackedEncoded:
        """Encode images.

        Args:
            encode: runs the tower on all images at once.
            patches: number of patches of each image.
            with_keys: whether to return the attention keys too.

        """
        sizes = list(patches)

        def read(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
            images = zip(query.split(sizes, dim=1), key.split(sizes, dim=1), strict=True)
            attended = [received_attention(*image, self._tap.scale)[0] for image in images]
            return torch.cat(attended), key[0].contiguous() if with_keys else None

        with self._tap.listen(read) as captured:
            result = encode()
        ((saliency, own),) = captured
        keys = None if own is None else self._tap.of_all_heads(own, dim=1)
        return PackedEncoded(
            result,
            self._tap.mean_over_heads(saliency).split(sizes),
            [None] * len(sizes) if keys is None else keys.split(sizes),
        )
