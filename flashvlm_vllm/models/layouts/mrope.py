# SPDX-License-Identifier: Apache-2.0
"""Models with M-RoPE: kept tokens keep their positions in time, row and column."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.multimodal.processing.processor import PromptUpdateInfo
from vllm.multimodal.video_prune import evs, vidcom2
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.utils.torch_utils import async_tensor_h2d

from flashvlm_vllm.ipc.item_fields import MODALITIES
from flashvlm_vllm.position_scheme import AXES
from flashvlm_vllm.processing.family import NO_ARGUMENTS
from flashvlm_vllm.processing.processor import VisualTokenProcessor
from flashvlm_vllm.request.budget import TokenCount
from flashvlm_vllm.selection import Selector
from flashvlm_vllm.vision.merging_tower import Grid, MergingTower
from flashvlm_vllm.worker.candidates import Item, Part
from flashvlm_vllm.worker.feature_cache import ImageFeatures
from flashvlm_vllm.worker.kept import Kept
from flashvlm_vllm.worker.positioned_model import closed_items
from flashvlm_vllm.worker.positions import (
    Span,
    channels,
    grid_positions,
    with_places,
    without_places,
)
from flashvlm_vllm.worker.pruned_model import PrunedModel

_CHANNELS = channels(AXES)


@dataclass(frozen=True)
class GridLayout:
    """An item's grid of patches, and the timing that its positions depend on."""

    grid: Grid
    time: Any
    """See `MRopeModel.times`."""


class MRopeCounts(VisualTokenProcessor):
    """Mixin of a processor that counts tokens from sizes rounded to whole tokens."""

    def count_image_tokens(
        self, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> TokenCount:
        """Count an image's tokens."""
        total = self.info.get_num_image_tokens(
            image_width=width,
            image_height=height,
            image_processor=self.info.get_image_processor(**arguments),
            mm_kwargs=arguments,
        )
        return TokenCount(total, total)

    def count_video_tokens(
        self,
        frames: int,
        width: int,
        height: int,
        metadata: Mapping[str, Any] | None,
        arguments: Mapping[str, Any] = NO_ARGUMENTS,
    ) -> TokenCount:
        """Count a video's tokens; several frames (usually two) form one time step."""
        total = self.info.get_num_video_tokens(
            image_width=width,
            image_height=height,
            num_frames=frames,
            image_processor=self.info.get_image_processor(**arguments),
            mm_kwargs=arguments,
        )
        together = self.info.get_hf_config().vision_config.temporal_patch_size
        return TokenCount(total, total, max(1, -(-frames // together)))

    def shorten_placeholder(self, whole: PromptUpdateInfo, count: TokenCount, keep: int) -> Any:
        """Shorten a placeholder, which vLLM's own video pruning may already have shortened."""
        if not isinstance(whole, list):
            raise TypeError("a placeholder of an M-RoPE model must be a list of token ids")
        # A video that is kept whole may be pruned by vLLM (--video-pruning-rate).
        return whole if keep == count.total else whole[:1] * keep


def together(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate items' patches, ``(sum of n_i, ...)``. A single item's are not copied: they may
    be hundreds of MiB."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class MRopeModel(PrunedModel):
    """Mixin of a model with M-RoPE: items are grids of patches in time, rows and columns."""

    config: Any
    visual: Any
    iter_mm_grid_thw: Any

    uses: ClassVar[tuple[str, ...]] = ("embed_multimodal", "iter_mm_grid_thw")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # vLLM's position channels hold rounded positions; this class appends its own instead.
        self.is_multimodal_pruning_enabled = False
        multimodal = vllm_config.model_config.get_multimodal_config()
        self._video_pruning = multimodal.get_video_pruning_spec()

    @property
    def layer(self) -> int:
        """The last layer of the tower with full attention over a time step."""
        return len(self.visual.blocks) - 1

    @cached_property
    def tower(self) -> MergingTower:
        """The vision tower; an error if the model is loaded without it."""
        return MergingTower(self.visual, self.layer)

    def spans(self, input_tokens: list[int], mm_features: list[Any]) -> list[Span]:
        """Return the items in prompt order; those with consecutive positions are left out."""
        lengths = {each.mm_position.offset: each.mm_position.length for each in mm_features}
        closed = closed_items(mm_features)
        return [
            Span.of_grid(offset, lengths[offset], grid_positions(*grid))
            for offset, *grid in self.iter_mm_grid_thw(mm_features)
            if offset not in closed
        ]

    def read_items(self, modality: str, kwargs: dict[str, Any]) -> list[Item]:
        """Read images or videos; an item's layout is a `GridLayout`."""
        grids = self._grids(modality, kwargs)
        patches = kwargs["pixel_values" if modality == "image" else "pixel_values_videos"]
        if isinstance(patches, list | tuple):
            patches = together(patches)
        pixels = patches.split([steps * high * wide for steps, high, wide in grids])
        return [
            Item(own, self.tower.tokens(grid), modality, GridLayout(grid, time))
            for own, grid, time in zip(pixels, grids, self.times(modality, kwargs), strict=True)
        ]

    def encode(self, items: Sequence[Item], *, with_keys: bool) -> list[ImageFeatures]:
        """Run the tower, merger included."""
        encoded = self.tower.run(
            # In the input's dtype, usually uint8; the tower converts the pixels.
            together([each.pixels for each in items]),
            [each.layout.grid for each in items],
            with_keys=with_keys,
        )
        return [
            ImageFeatures(each.features, each.projected, each.saliency, each.keys)
            for each in encoded
        ]

    def parts(self, item: Item, features: ImageFeatures, selector: Selector) -> list[Part]:
        """Return all tokens of an item as one part, ordered by time step.

        The tower's merger projects several patches at once, so a selector that merges tokens
        averages projected tokens.
        """
        columns = item.layout.grid[2] // self.visual.spatial_merge_size
        shown = replace(
            features,
            features=features.projected if selector.merges else features.features,
            projected=self.into_first_layer(features.projected),
        )
        part = Part.of_clip(shown, columns)
        return [replace(part, embeddings=features.projected.flatten(0, 1))]

    def item_positions(self, item: Item) -> Tensor:
        """Return time, row and column of each token; a video's timestamps are not counted."""
        (steps, high, wide), time = item.layout.grid, item.layout.time
        side = self.visual.spatial_merge_size
        factor = time if isinstance(time, float) else 1.0
        return torch.from_numpy(grid_positions(steps, high // side, wide // side, factor))

    def project_merged(self, merged: Tensor) -> Tensor:
        """Return merged tokens, which are already projected."""
        return merged

    def finish(
        self, items: Sequence[Item], kept: Sequence[Kept], gaps: Sequence[int]
    ) -> list[Tensor]:
        """Return the embeddings of each placeholder, with the positions of its tokens."""
        embeddings = []
        for item, each, gap in zip(items, kept, gaps, strict=True):
            grid, time = item.layout.grid, item.layout.time
            if len(each.rows) == item.tokens:
                embeddings.append(self._left_to_vllm(each.rows, grid, time, item.modality))
                continue
            is_closed = gap < 0
            stays = each if is_closed and time is None else each.ascending()
            placed = self.laid_out(stays.rows, stays.spots, grid, time)
            embeddings.append(without_places(placed[:, :-_CHANNELS]) if is_closed else placed)
        return embeddings

    def finish_whole(self, kwargs: Mapping[str, Any], embeddings: Any) -> Any:
        """Append position channels. Without a budget, vLLM's own video pruning still applies."""
        modality = next((each for each in MODALITIES if f"{each}_grid_thw" in kwargs), None)
        if modality is None:
            return embeddings
        grids, times = self._grids(modality, kwargs), self.times(modality, kwargs)
        return [
            self._left_to_vllm(rows, grid, time, modality)
            for rows, grid, time in zip(embeddings, grids, times, strict=True)
        ]

    def get_encoder_cudagraph_config(self) -> Any:
        """Return vLLM's own: with ``--video-pruning-rate`` no modality has CUDA graphs."""
        self.is_multimodal_pruning_enabled = self._video_pruning is not None
        try:
            return super().get_encoder_cudagraph_config()  # type: ignore[misc]
        finally:
            self.is_multimodal_pruning_enabled = False

    def _left_to_vllm(self, rows: Tensor, grid: Grid, time: Any, modality: str) -> Tensor:
        if self._video_pruning is None or modality != "video" or not self.prunes_videos_itself:
            return without_places(rows)
        method, rate = self._video_pruning
        choose = vidcom2 if method == "vidcom2" else evs
        with gpu_sync_allowed():
            mask = choose.compute_retention_mask(
                rows, grid, spatial_merge_size=self.visual.spatial_merge_size, q=rate
            )
            (kept,) = mask.nonzero(as_tuple=True)
        return self.laid_out(rows[kept], kept, grid, time)

    prunes_videos_itself = False
    """Whether vLLM's own model supports ``--video-pruning-rate``."""

    def laid_out(self, rows: Tensor, kept: Tensor, grid: Grid, time: Any) -> Tensor:
        """Return the embeddings of an item's placeholder, with position channels.

        Args:
            rows: ``(T, D)`` embeddings.
            kept: ``(T,)`` indices among the item's tokens, ascending.
            grid: grid of the item's patches.
            time: the item's entry of `times`.

        """
        steps, high, wide = grid
        side = self.visual.spatial_merge_size
        positions = grid_positions(steps, high // side, wide // side, time)
        on_device = async_tensor_h2d(torch.from_numpy(positions), rows.device)
        return with_places(rows, on_device[kept], int(positions.max()) + 1)

    def _grids(self, modality: str, kwargs: Mapping[str, Any]) -> list[Grid]:
        return [
            (int(steps), int(high), int(wide))
            for steps, high, wide in kwargs[f"{modality}_grid_thw"].tolist()
        ]

    def times(self, modality: str, kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the timing that each item's positions depend on, in addition to its grid.

        By default the number of positions per time step.
        """
        seconds = kwargs.get("second_per_grid_ts") if modality == "video" else None
        if seconds is None:
            tokens = 1.0 if modality == "image" else self._tokens_per_second
            return [tokens] * len(kwargs[f"{modality}_grid_thw"])
        return [
            float(each) * self._tokens_per_second
            for each in torch.as_tensor(seconds).flatten().tolist()
        ]

    @property
    def _tokens_per_second(self) -> float:
        return float(getattr(self.config.vision_config, "tokens_per_second", 1.0))

    def into_first_layer(self, projected: Tensor) -> Tensor:
        """Return the part of the projections that is input of the language model's first layer."""
        return projected
