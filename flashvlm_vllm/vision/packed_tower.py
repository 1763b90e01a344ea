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
        self._tap = AttentionTap(attention, heads)

    def run(
        self, encode: Callable[[], Any], patches: Sequence[int], *, with_keys: bool = False
    ) -> PackedEncoded:
        """Encode images.

        Args:
            encode: runs the tower on all images at once.
            patches: how many each image has.
            with_keys: whether to return the keys as well.

        """
        sizes = list(patches)

        def read(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
            images = zip(query.split(sizes, dim=1), key.split(sizes, dim=1), strict=True)
            attended = [received_attention(*image, self._tap.scale)[0] for image in images]
            return torch.cat(attended), key[0].contiguous() if with_keys else None

        with self._tap.listen(read) as heard:
            result = encode()
        ((saliency, own),) = heard
        keys = None if own is None else self._tap.of_all_heads(own, dim=1)
        return PackedEncoded(
            result,
            self._tap.mean_over_heads(saliency).split(sizes),
            [None] * len(sizes) if keys is None else keys.split(sizes),
        )
