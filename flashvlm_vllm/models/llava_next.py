# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT: a base crop and tiles, each selected separately; kept tokens are in image order.

The row newlines of a pruned image are removed: they mark the end of rows of which only some patches
are left, and the published LLaVA-NeXT results for pruning are without them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.utils.torch_utils import async_tensor_h2d

from flashvlm_vllm.ipc.explain_request import Placed
from flashvlm_vllm.models.layouts.anyres import AnyresCounts, tile_picture
from flashvlm_vllm.models.layouts.crops import CropModel
from flashvlm_vllm.models.layouts.regions import anyres_tiles
from flashvlm_vllm.processing.family import NO_ARGUMENTS
from flashvlm_vllm.processing.processor import VisualTokenProcessor
from flashvlm_vllm.selection import Selection, Selector
from flashvlm_vllm.worker.candidates import Item, Part
from flashvlm_vllm.worker.feature_cache import ImageFeatures
from flashvlm_vllm.worker.kept import Kept

_CACHED_SIZES = 128
"""Number of layouts cached by image size; each is at most 46 kB."""


class PrunedLlavaNextProcessor(
    AnyresCounts, VisualTokenProcessor, LlavaNextMultiModalProcessor[Any]
):
    """LLaVA-NeXT's processor: the number of tokens depends on the image's size."""

    def part_regions(
        self, modality: str, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> dict[int, Placed]:
        """Return the regions of base crop and tiles."""
        return anyres_tiles(self.info.get_hf_config(), width, height)


@dataclass(frozen=True)
class _Crop:
    """One crop's tokens: rows of the image's flattened crops, and their order in the image."""

    rows: Tensor
    order: Tensor


@dataclass(frozen=True)
class _Layout:
    """An image's crops, base first, and the number of columns of the tiled image."""

    crops: list[_Crop]
    columns: int


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaNextProcessor,
    info=LlavaNextProcessingInfo,
    dummy_inputs=LlavaDummyInputsBuilder,
)
class PrunedLlavaNext(CropModel, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with visual token selection."""

    uses: ClassVar[tuple[str, ...]] = (*CropModel.uses, "_merge_image_patch_embeddings")

    def parts(self, item: Item, features: ImageFeatures, selector: Selector) -> list[Part]:
        """Return the crops.

        Spots index the image's tokens: base patches first, then the tiles' patches that unpadding
        leaves, in raster order.
        """
        crops = self._layout_of(item.layout, features.saliency.device).crops
        projected, before = features.projected.flatten(0, 1), features.features.flatten(0, 1)
        saliency = features.saliency.flatten()
        keys = None if features.keys is None else features.keys.flatten(0, 1)
        return [
            Part(
                projected=projected[crop.rows],
                features=before[crop.rows],
                saliency=saliency[crop.rows],
                keys=None if keys is None else keys[crop.rows],
                places=self.grid_places(crop.rows % self.salient_tower.tokens),
                spots=crop.order,
                number=number,
            )
            for number, crop in enumerate(crops)
        ]

    def assemble(self, parts: Sequence[Part], chosen: Sequence[Selection]) -> Kept:
        """Sort the kept tokens in image order; merged tokens remain ordered by crop."""
        kept = super().assemble(parts, chosen)
        if kept.is_merged:
            return kept
        spots, order = kept.spots.sort()
        return Kept(kept.rows[order], spots)

    def whole_rows(self, item: Item, features: ImageFeatures) -> Tensor:
        """Return an image's embeddings with its row newlines."""
        whole: Tensor = self._merge_image_patch_embeddings(
            torch.tensor(item.layout), features.projected, strategy="spatial_unpad"
        )
        return whole

    def prompt_places(self, item: Item, spots: Tensor) -> Tensor:
        """Add the number of newlines before each token: one per row of the tiled image."""
        base = self.salient_tower.tokens
        columns = self._layout_of(item.layout, spots.device).columns
        return spots + (spots - base).clamp(min=0) // columns

    @cached_property
    def _layout_of(self) -> Callable[[tuple[int, int], torch.device], _Layout]:
        # Image sizes recur, and a layout takes thousands of Python operations and a few copies.
        return lru_cache(maxsize=_CACHED_SIZES)(self._lay_out)

    def _lay_out(self, size: tuple[int, int], device: torch.device) -> _Layout:
        """Return an image's crops with the patches that unpadding leaves, base first."""
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        per_crop = side * side
        grid = get_anyres_image_grid_shape(
            size, self.config.image_grid_pinpoints, self.config.vision_config.image_size
        )
        base = torch.arange(per_crop)
        tiles = tile_picture(grid, side, size)
        picture = torch.cat([base, tiles.flatten()])
        crop_of = picture // per_crop
        crops = []
        for number in range(1 + grid[0] * grid[1]):
            order = (crop_of == number).nonzero().flatten()
            if len(order):
                rows = async_tensor_h2d(picture[order], device)
                crops.append(_Crop(rows, async_tensor_h2d(order, device)))
        return _Layout(crops, tiles.shape[1])
