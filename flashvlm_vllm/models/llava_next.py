# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT: a base crop and tiles, each selected on its own, kept in picture order.

An image that is pruned loses its row newlines: they mark the end of picture rows of which
only some patches are left, and the published LLaVA-NeXT results for pruning have none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

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

from flashvlm_vllm.budget import TokenCount
from flashvlm_vllm.explained import Placed
from flashvlm_vllm.models.anyres import spread_budget, tile_picture
from flashvlm_vllm.models.kept import Kept
from flashvlm_vllm.models.llava import LlavaSelection
from flashvlm_vllm.models.memory import ImageFeatures
from flashvlm_vllm.models.pruning import Candidates, Wanted
from flashvlm_vllm.models.regions import anyres_tiles
from flashvlm_vllm.processing import VisualTokenProcessor
from flashvlm_vllm.selection import Selection

_REMEMBERED_SIZES = 128
"""Layouts of images by their size; one is 46 kB at most."""


class AnyresCounts:
    """Mixin of a processor whose images are a base crop and tiles with a newline to each row."""

    info: Any

    def count_image_tokens(self, width: int, height: int) -> TokenCount:
        """Count an image's tokens; row newlines are not among those to choose from."""
        total = self.info.get_num_image_tokens(image_width=width, image_height=height)
        config = self.info.get_hf_config()
        encoder = self.info.get_vision_encoder_info()
        rows, columns = get_anyres_image_grid_shape(
            image_size=(height, width),
            grid_pinpoints=config.image_grid_pinpoints,
            patch_size=encoder.get_image_size(),
        )
        _, newlines = self.info._get_num_unpadded_features(
            original_height=height,
            original_width=width,
            npatches=encoder.get_patch_grid_length(),
            num_patch_height=rows,
            num_patch_width=columns,
        )
        return TokenCount(total, total - newlines)


class PrunedLlavaNextProcessor(
    AnyresCounts, VisualTokenProcessor, LlavaNextMultiModalProcessor[Any]
):
    """LLaVA-NeXT's processor: the number of tokens follows from the image's size."""

    def places_of_parts(self, modality: str, width: int, height: int) -> dict[int, Placed]:
        """Tell where base crop and tiles lie."""
        return anyres_tiles(self.info.get_hf_config(), width, height)


@dataclass(frozen=True)
class _Crop:
    """One crop's candidates: rows of the image's flattened crops, and their picture order."""

    rows: Tensor
    order: Tensor


@dataclass(frozen=True)
class _Layout:
    """An image's crops, base first, and the columns of its tiles' picture."""

    crops: list[_Crop]
    columns: int


@dataclass(frozen=True)
class _Part:
    """One crop of one image with what is selected from it."""

    image: int
    crop: _Crop
    candidates: Candidates


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaNextProcessor,
    info=LlavaNextProcessingInfo,
    dummy_inputs=LlavaDummyInputsBuilder,
)
class PrunedLlavaNext(LlavaSelection, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT that keeps, of each image, the tokens its request's question selects."""

    def embed_batch(
        self,
        images: Sequence[ImageFeatures],
        sizes: Sequence[tuple[int, int]],
        wanted: Wanted,
        text: Sequence[Tensor | None],
    ) -> list[Kept]:
        """Select of a few images together.

        Spots are those of the picture: base patches first, then the tiles' patches that
        unpadding leaves, in raster order.
        """
        parts: list[_Part] = []
        for number, (image, size) in enumerate(zip(images, sizes, strict=True)):
            crops = self._layout_of(size, image.saliency.device).crops
            patches = [len(crop.rows) for crop in crops]
            shares = spread_budget(min(wanted.kept[number], sum(patches)), patches)
            for part, (crop, share) in enumerate(zip(crops, shares, strict=True)):
                if share:
                    candidates = Candidates(
                        wanted.selectors[number],
                        wanted.identities[number],
                        share,
                        image.projected.flatten(0, 1)[crop.rows],
                        image.features.flatten(0, 1)[crop.rows],
                        image.saliency.flatten()[crop.rows],
                        text[number],
                        None if image.keys is None else image.keys.flatten(0, 1)[crop.rows],
                        self.places_of(crop.rows % self.salient_tower.tokens),
                        part=part,
                    )
                    parts.append(_Part(number, crop, candidates))
        chosen = self.select([part.candidates for part in parts])

        kept: list[Kept] = []
        for number, (image, size) in enumerate(zip(images, sizes, strict=True)):
            mine = [
                (part, selection)
                for part, selection in zip(parts, chosen, strict=True)
                if part.image == number
            ]
            stays = self._in_picture_order(mine)
            if wanted.kept[number] > len(stays.rows):
                # Kept whole beside a larger image of the same request: with its newlines.
                whole = self._merge_image_patch_embeddings(
                    torch.tensor(size), image.projected, strategy="spatial_unpad"
                )
                stays = replace(stays, rows=whole)
            kept.append(stays)
        return kept

    def places_in_prompt(
        self, spots: Tensor, size: tuple[int, int] | None, modality: str
    ) -> Tensor:
        """Count the newlines before each: one behind every row of the tiles' picture."""
        assert size is not None
        base = self.salient_tower.tokens
        columns = self._layout_of(size, spots.device).columns
        return spots + (spots - base).clamp(min=0) // columns

    def _in_picture_order(self, parts: Sequence[tuple[_Part, Selection]]) -> Kept:
        """Put an image's kept tokens together; merged ones stay crop by crop."""
        rows = torch.cat([self.embed(part.candidates, selection) for part, selection in parts])
        spots = torch.cat([part.crop.order[selection.spots] for part, selection in parts])
        if any(selection.indices is None for _, selection in parts):
            return Kept(rows, spots, is_merged=True)
        spots, position = spots.sort()
        return Kept(rows[position], spots)

    @cached_property
    def _layout_of(self) -> Callable[[tuple[int, int], torch.device], _Layout]:
        # Sizes come again, and each is some thousand steps of Python and a few copies.
        return lru_cache(maxsize=_REMEMBERED_SIZES)(self._lay_out)

    def _lay_out(self, size: tuple[int, int], device: torch.device) -> _Layout:
        """List an image's crops with the patches that unpadding leaves, base first."""
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
