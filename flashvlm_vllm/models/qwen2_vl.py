# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL and Qwen2.5-VL: images and videos whose kept tokens keep their 3-D positions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing.processor import PromptUpdateInfo
from vllm.multimodal.video_prune import evs, vidcom2
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.utils.torch_utils import async_tensor_h2d

from flashvlm_vllm.budget import TokenCount
from flashvlm_vllm.fields import KEPT, MODALITIES, field_name
from flashvlm_vllm.models.kept import Kept
from flashvlm_vllm.models.memory import ImageFeatures
from flashvlm_vllm.models.places import closed_items
from flashvlm_vllm.models.positions import (
    Span,
    channels,
    grid_positions,
    with_places,
    without_places,
)
from flashvlm_vllm.models.pruning import (
    Candidates,
    VisualTokenSelection,
    Wanted,
    clip_candidates,
)
from flashvlm_vllm.processing import VisualTokenProcessor
from flashvlm_vllm.schemes import AXES
from flashvlm_vllm.selection import Selection
from flashvlm_vllm.selection.registry import find_selector
from flashvlm_vllm.vision.merging_tower import Grid, MergingTower

_CHANNELS = channels(AXES)


class QwenCounts(VisualTokenProcessor):
    """Mixin of a processor whose counts follow from sizes rounded to whole tokens."""

    def count_image_tokens(self, width: int, height: int) -> TokenCount:
        """Count an image's tokens."""
        arguments = self.request_arguments
        total = self.info.get_num_image_tokens(
            image_width=width,
            image_height=height,
            image_processor=self.info.get_image_processor(**arguments),
            mm_kwargs=arguments,
        )
        return TokenCount(total, total)

    def count_video_tokens(
        self, frames: int, width: int, height: int, metadata: Mapping[str, Any] | None
    ) -> TokenCount:
        """Count a video's tokens; some frames (two) make one time step."""
        arguments = self.request_arguments
        total = self.info.get_num_video_tokens(
            image_width=width,
            image_height=height,
            num_frames=frames,
            image_processor=self.info.get_image_processor(**arguments),
            mm_kwargs=arguments,
        )
        together = self.info.get_hf_config().vision_config.temporal_patch_size
        return TokenCount(total, total, max(1, -(-frames // together)))

    def shorten_placeholder(self, whole: PromptUpdateInfo, count: TokenCount, kept: int) -> Any:
        """Shorten a placeholder, which vLLM's own pruning of videos may have shortened already."""
        if not isinstance(whole, list):
            raise TypeError("a placeholder of Qwen2-VL is a list of ids")
        # One that stays whole is vLLM's to prune, where --video-pruning-rate says so.
        return whole if kept == count.total else whole[:1] * kept


def together(parts: Sequence[Tensor]) -> Tensor:
    """Join items' patches, ``(sum of n_i, ...)``; one item's, hundreds of MiB, are not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class QwenSelection(VisualTokenSelection):
    """What Qwen2-VL and Qwen2.5-VL share.

    Derive from this first and from vLLM's model second.
    """

    config: Any
    visual: Any
    iter_mm_grid_thw: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        # vLLM's own channels hold rounded positions; all of that happens here.
        self.is_multimodal_pruning_enabled = False
        multimodal = vllm_config.model_config.get_multimodal_config()
        self._video_pruning = multimodal.get_video_pruning_spec()
        self.set_up_selection(vllm_config)

    @property
    def layer(self) -> int:
        """The last layer of the tower that attends over whole time steps."""
        return len(self.visual.blocks) - 1

    @cached_property
    def tower(self) -> MergingTower:
        """The tower, which a model loaded without its vision part does not have."""
        return MergingTower(self.visual, self.layer)

    def get_mm_lora_token_counts(
        self, *, modality: str, mm_kwargs: Any, num_mm_embeds: int
    ) -> tuple[int, int | None]:
        """Count what an adapter on the tower or the merger sees: whole items."""
        if mm_kwargs is not None and field_name(KEPT, modality) in mm_kwargs:
            grid = mm_kwargs[f"{modality}_grid_thw"].data
            num_mm_embeds = int(grid.prod()) // self.visual.spatial_merge_size**2
        counts: tuple[int, int | None] = super().get_mm_lora_token_counts(  # type: ignore[misc]
            modality=modality, mm_kwargs=mm_kwargs, num_mm_embeds=num_mm_embeds
        )
        return counts

    def spans(self, input_tokens: list[int], mm_features: list[Any]) -> list[Span]:
        """List a prompt's items in its order; those that close up are laid out as text."""
        lengths = {each.mm_position.offset: each.mm_position.length for each in mm_features}
        closed = closed_items(mm_features)
        return [
            Span.of_grid(offset, lengths[offset], grid_positions(*grid))
            for offset, *grid in self.iter_mm_grid_thw(mm_features)
            if offset not in closed
        ]

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode images or videos; those with a budget come back as their kept tokens only."""
        wanted = Wanted.take_from(kwargs)
        if wanted is None:
            return self._embed_whole(kwargs)
        pixels, grids = self._read(wanted.modality, kwargs)
        times = self.times(wanted.modality, kwargs)
        text = self.embed_queries(wanted.queries)
        kept: list[Tensor | None] = []
        embeddings: list[Tensor] = []
        totals = [self.tower.tokens(grid) for grid in grids]
        for batch in self.encoder_batches(totals):
            mine = wanted[batch]
            items = self._features_of(pixels[batch], grids[batch], mine)
            candidates = [
                self.candidates(item, grid, mine, number, text[batch.start + number])
                for number, (item, grid) in enumerate(zip(items, grids[batch], strict=True))
            ]
            chosen = self.select(candidates)
            for each, item, selected, grid, time, gap in zip(
                candidates, items, chosen, grids[batch], times[batch], mine.gaps, strict=True
            ):
                kept.append(selected.indices)
                rows = self.rows_of(item, selected)
                if each.budget >= len(each.projected):
                    embeddings.append(self._left_to_vllm(rows, grid, time, wanted.modality))
                    continue
                stays = Kept.of(selected, rows)
                is_closed = gap < 0
                stays = stays if is_closed and time is None else stays.ascending()
                placed = self.laid_out(stays.rows, stays.spots, grid, time)
                embeddings.append(without_places(placed[:, :-_CHANNELS]) if is_closed else placed)
        self.trace(totals, kept, wanted.queries)
        return embeddings

    def _embed_whole(self, kwargs: dict[str, Any]) -> Any:
        """Encode as vLLM does; without a budget its own pruning of videos still applies."""
        modality = next((each for each in MODALITIES if f"{each}_grid_thw" in kwargs), None)
        if modality is None:
            return super().embed_multimodal(**kwargs)
        grids, times = self._grids(modality, kwargs), self.times(modality, kwargs)
        embeddings = super().embed_multimodal(**kwargs)
        return [
            self._left_to_vllm(rows, grid, time, modality)
            for rows, grid, time in zip(embeddings, grids, times, strict=True)
        ]

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
    """Whether vLLM's own model heeds --video-pruning-rate."""

    def rows_of(self, item: ImageFeatures, selected: Selection) -> Tensor:
        """Return the embeddings of what stays, ``(T, D)``."""
        if selected.merged is not None:
            return selected.merged
        return item.projected.flatten(0, 1)[selected.indices]

    def laid_out(self, rows: Tensor, kept: Tensor, grid: Grid, time: Any) -> Tensor:
        """Return what an item's placeholder stands for, with its positions.

        Args:
            rows: ``(T, D)`` embeddings.
            kept: ``(T,)`` which of the item's tokens these are, ascending.
            grid: of the item's patches.
            time: as of `times`.

        """
        steps, high, wide = grid
        side = self.visual.spatial_merge_size
        positions = grid_positions(steps, high // side, wide // side, time)
        on_device = async_tensor_h2d(torch.from_numpy(positions), rows.device)
        return with_places(rows, on_device[kept], int(positions.max()) + 1)

    def _read(self, modality: str, kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Grid]]:
        """Return each item's patches and grid of patches."""
        grids = self._grids(modality, kwargs)
        patches = kwargs["pixel_values" if modality == "image" else "pixel_values_videos"]
        if isinstance(patches, list | tuple):
            patches = together(patches)
        counts = [steps * high * wide for steps, high, wide in grids]
        return list(patches.split(counts)), grids

    def _grids(self, modality: str, kwargs: dict[str, Any]) -> list[Grid]:
        return [
            (int(steps), int(high), int(wide))
            for steps, high, wide in kwargs[f"{modality}_grid_thw"].tolist()
        ]

    def times(self, modality: str, kwargs: dict[str, Any]) -> list[Any]:
        """Return of each item what its positions depend on beside its grid.

        Here: positions per time step.
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

    def _features_of(
        self, pixels: Sequence[Tensor], grids: Sequence[Grid], wanted: Wanted
    ) -> list[ImageFeatures]:
        with_keys = wanted.use_keys

        def encode(missing: list[int]) -> list[ImageFeatures]:
            encoded = self.tower.run(
                # As they came, bytes as a rule: the tower makes numbers of them, and frees those.
                together([pixels[number] for number in missing]),
                [grids[number] for number in missing],
                with_keys=with_keys,
            )
            return [
                ImageFeatures(each.features, each.projected, each.saliency, each.keys)
                for each in encoded
            ]

        return self.feature_cache.features_of(wanted.images, encode, with_keys=with_keys)

    def candidates(
        self, item: ImageFeatures, grid: Grid, wanted: Wanted, number: int, text: Tensor | None
    ) -> Candidates:
        """Return what the selection chooses from: all tokens of an item, time-major.

        The tower's merger takes several patches at once, so a selector that merges tokens does
        that behind it.
        """
        columns = grid[2] // self.visual.spatial_merge_size
        merges = find_selector(wanted.selectors[number]).merges
        shown = replace(
            item,
            features=item.projected if merges else item.features,
            projected=self.into_first_layer(item.projected),
        )
        return clip_candidates(shown, wanted, number, text, columns)

    def into_first_layer(self, projected: Tensor) -> Tensor:
        """Return what of the projections goes into the language model's first layer."""
        return projected


class PrunedQwen2VLProcessor(QwenCounts, Qwen2VLMultiModalProcessor):
    """Qwen2-VL's processor."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen2VLProcessor, info=Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class PrunedQwen2VL(QwenSelection, Qwen2VLForConditionalGeneration):
    """Qwen2-VL that keeps the tokens its requests' questions select."""


class PrunedQwen2_5_VLProcessor(QwenCounts, Qwen2_5_VLMultiModalProcessor):
    """Qwen2.5-VL's processor."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen2_5_VLProcessor,
    info=Qwen2_5_VLProcessingInfo,
    dummy_inputs=Qwen2_5_VLDummyInputsBuilder,
)
class PrunedQwen2_5_VL(QwenSelection, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL that keeps the tokens its requests' questions select."""

    prunes_videos_itself = True

    @property
    def layer(self) -> int:
        """The last layer that does not attend within windows; the last of all as released."""
        return int(max(self.visual.fullatt_block_indexes))
