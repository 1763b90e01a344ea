# SPDX-License-Identifier: Apache-2.0
"""Features and saliency of GLM-4.1V's tower, which merges squares of patches by a convolution."""

from typing import Any

from torch import Tensor

from flashvlm_vllm.vision.merging_tower import MergingTower


class ConvolvingTower(MergingTower):
    """A tower without CLS that convolves each square of patches to a token."""

    def merging_module(self, visual: Any) -> Any:
        """Return the convolution; the merger behind it sees one vector for each token."""
        return visual.downsample

    def mean_of_patches(self, heard: Tensor) -> Tensor:
        """Return ``(tokens, C)`` of the convolution's input, ``(tokens, C, side, side)``."""
        return heard.mean(dim=(-2, -1))
