# SPDX-License-Identifier: Apache-2.0
"""Features and saliency of GLM-4.1V's tower, which merges squares of patches by convolution."""

from typing import Any

from torch import Tensor

from flashvlm_vllm.vision.merging_tower import MergingTower


class ConvolvingTower(MergingTower):
    """A tower without CLS that merges each square of patches into a token by convolution."""

    def merging_module(self, visual: Any) -> Any:
        """Return the convolution; the merger after it gets one vector per token."""
        return visual.downsample

    def mean_of_patches(self, heard: Tensor) -> Tensor:
        """Return the mean ``(tokens, C)`` of the convolution's input, ``(tokens, C, s, s)``."""
        return heard.mean(dim=(-2, -1))
