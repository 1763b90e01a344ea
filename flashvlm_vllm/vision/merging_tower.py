# SPDX-License-Identifier: Apache-2.0
"""Features and saliency of towers that merge squares of patches: Qwen2-VL and later models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashvlm_vllm.vision.attention import received_attention
from flashvlm_vllm.vision.tap import AttentionTap, inputs_of

Grid = tuple[int, int, int]
"""Time steps, rows and columns of patches."""


@dataclass(frozen=True)
class Merged:
    """Output of a tower for an image or video of ``T`` time steps with ``n`` tokens each."""

    features: Tensor
    """``(T, n, C)``: mean of each token's patches, before the merger."""
    projected: Tensor
    """``(T, n, D)``."""
    saliency: Tensor
    """``(T, n)`` float32: attention received within the time step, mean over heads and patches."""
    keys: Tensor | None = None
    """``(T, n, H, d)`` attention keys, mean over the patches; ``None`` unless requested."""


class MergingTower:
    """A tower without CLS whose merger merges a square of patches into one token.

    The attention is that of the last layer with full attention over a time step: in Qwen2.5-VL most
    layers have window attention, but not the last one.
    """

    def __init__(self, visual: Any, layer: int) -> None:
        """Attach to ``visual``, vLLM's tower, at a layer with full attention over time steps."""
        self._visual = visual
        self._merging = self.merging_module(visual)
        self._tap = AttentionTap(visual.blocks[layer].attn.attn, visual.num_heads)
        self.merged: int = visual.spatial_merge_size**2
        """Number of patches per token."""

    def merging_module(self, visual: Any) -> Any:
        """Return the module whose input is the patches of each token."""
        merger = visual.merger
        return merger.mlp[0] if hasattr(merger, "mlp") else merger.linear_fc1

    def mean_of_patches(self, heard: Tensor) -> Tensor:
        """Return the mean ``(tokens, C)`` of that module's input ``(tokens, patches * C)``."""
        mean: Tensor = heard.unflatten(-1, (self.merged, -1)).mean(dim=-2)
        return mean

    def tokens(self, grid: Grid) -> int:
        """Count the visual tokens of a grid of patches."""
        steps, rows, columns = grid
        return steps * rows * columns // self.merged

    def run(
        self, pixels: Tensor, grids: Sequence[Grid], *, with_keys: bool = False
    ) -> list[Merged]:
        """Encode images or videos.

        Args:
            pixels: ``(sum of patches, ...)``, flattened by vLLM's processor.
            grids: grid of patches of each item.
            with_keys: whether to return the attention keys too.

        """
        tokens = [self.tokens(grid) for grid in grids]
        patches = [count * self.merged for count in tokens]

        def read(query: Tensor, key: Tensor) -> tuple[Tensor, list[Tensor] | None]:
            items = list(zip(grids, query[0].split(patches), key[0].split(patches), strict=True))
            saliency = torch.cat([self._received(*item) for item in items])
            if not with_keys:
                return saliency, None
            return saliency, [own.unflatten(0, (-1, self.merged)).mean(dim=1) for *_, own in items]

        with (
            self._tap.listen(read) as captured,
            inputs_of(self._merging) as merging,
        ):
            projected = self._visual(pixels, grid_thw=[list(grid) for grid in grids])
        ((saliency, keys),), (features,) = captured, merging
        saliency = self._tap.mean_over_heads(saliency).view(-1, self.merged).mean(dim=1)
        features = self.mean_of_patches(features)
        items = zip(
            grids,
            features.split(tokens),
            projected.split(tokens),
            saliency.split(tokens),
            [None] * len(grids) if keys is None else keys,
            strict=True,
        )
        return [self._in_order(*item) for item in items]

    def _received(self, grid: Grid, query: Tensor, key: Tensor) -> Tensor:
        """Return the attention that patches receive within their time step, ``(patches,)``."""
        steps = (grid[0], -1)
        return received_attention(
            query.unflatten(0, steps), key.unflatten(0, steps), self._tap.scale
        ).flatten()

    def _in_order(
        self,
        grid: Grid,
        features: Tensor,
        projected: Tensor,
        saliency: Tensor,
        keys: Tensor | None,
    ) -> Merged:
        """Restore raster order; all inputs but the projections are in window order."""
        steps = (grid[0], -1)
        if hasattr(self._visual, "get_window_index_thw"):
            by_window, _ = self._visual.get_window_index_thw(*grid)
            place = torch.argsort(by_window).to(features.device)
            features, saliency = features[place], saliency[place]
            keys = None if keys is None else keys[place]
        return Merged(
            features.unflatten(0, steps),
            projected.unflatten(0, steps),
            saliency.unflatten(0, steps),
            None if keys is None else keys.unflatten(0, steps),
        )
