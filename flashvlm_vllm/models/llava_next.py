# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT: a base crop and tiles, each selected on its own, kept in picture order.

An image that is pruned loses its row newlines: they mark the end of picture rows of which
only some patches are left, and the published LLaVA-NeXT results for pruning have none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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

from flashvlm_vllm.models.anyres import spread_budget, tile_patches
from flashvlm_vllm.models.llava import LlavaSelection
from flashvlm_vllm.models.pruning import Candidates, Wanted
from flashvlm_vllm.processing import TokenCount, VisualTokenProcessor


class PrunedLlavaNextProcessor(VisualTokenProcessor, LlavaNextMultiModalProcessor[Any]):
    """LLaVA-NeXT's processor: the number of tokens follows from the image's size."""

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


@dataclass(frozen=True)
class _Crop:
    """One crop's candidates: rows of the image's flattened crops, and their picture order."""

    rows: Tensor
    order: Tensor


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaNextProcessor,
    info=LlavaNextProcessingInfo,
    dummy_inputs=LlavaDummyInputsBuilder,
)
class PrunedLlavaNext(LlavaSelection, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT that keeps, of each image, the tokens its request's question selects."""

    def embed_batch(
        self, image_input: Any, batch: slice, wanted: Wanted, text: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Encode a few images together.

        Positions are those of the picture: base patches first, then the tiles' patches that
        unpadding leaves, in raster order.
        """
        images = list(image_input["pixel_values"][batch])
        sizes = [tuple(size) for size in image_input["image_sizes"][batch].tolist()]
        crop_counts = [len(crops) for crops in images]
        tower_features, attention = self.encode(torch.cat(images))
        projected = self.multi_modal_projector(tower_features).split(crop_counts)
        by_image = [
            (features.flatten(0, 1), saliency.flatten(), diversity.flatten(0, 1))
            for features, saliency, diversity in zip(
                projected,
                attention.split(crop_counts),
                tower_features.split(crop_counts),
                strict=True,
            )
        ]
        crops = [self._crops(size, attention.device) for size in sizes]

        parts: list[tuple[int, _Crop]] = []
        candidates: list[Candidates] = []
        for image, (features, saliency, diversity) in enumerate(by_image):
            patches = [len(crop.rows) for crop in crops[image]]
            shares = spread_budget(min(wanted.kept[image], sum(patches)), patches)
            for number, (crop, share) in enumerate(zip(crops[image], shares, strict=True)):
                if share:
                    parts.append((image, crop))
                    candidates.append(
                        Candidates(
                            (wanted.identities[image], number),
                            share,
                            features[crop.rows],
                            saliency[crop.rows],
                            text[image],
                            diversity[crop.rows],
                        )
                    )
        chosen = self.select(candidates)

        kept, embeddings = [], []
        for image, (features, _, _) in enumerate(by_image):
            mine = [
                (crop, rows)
                for (owner, crop), rows in zip(parts, chosen, strict=True)
                if owner == image
            ]
            order, position = torch.cat([crop.order[rows] for crop, rows in mine]).sort()
            rows = torch.cat([crop.rows[rows] for crop, rows in mine])[position]
            kept.append(order)
            if wanted.kept[image] > sum(len(crop.rows) for crop in crops[image]):
                # Kept whole beside a larger image of the same request: with its newlines.
                size = torch.tensor(sizes[image])
                embeddings.append(
                    self._merge_image_patch_embeddings(
                        size, projected[image], strategy="spatial_unpad"
                    )
                )
            else:
                embeddings.append(features[rows])
        return kept, embeddings

    def _crops(self, size: tuple[int, int], device: torch.device) -> list[_Crop]:
        """List an image's crops with the patches that unpadding leaves, base first."""
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        per_crop = side * side
        grid = get_anyres_image_grid_shape(
            size, self.config.image_grid_pinpoints, self.config.vision_config.image_size
        )
        base = torch.arange(per_crop)
        picture = torch.cat([base, tile_patches(grid, side, size)])
        crop_of = picture // per_crop
        crops = []
        for number in range(1 + grid[0] * grid[1]):
            order = (crop_of == number).nonzero().flatten()
            if len(order):
                crops.append(_Crop(picture[order].to(device), order.to(device)))
        return crops
