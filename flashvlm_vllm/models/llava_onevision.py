# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision: base crop and tiled picture of an image, all frames of a video.

A large picture of tiles is scaled down before the language model. The selection chooses from the
scaled tokens, so features, saliency and keys are scaled in the same way. With a merging selector,
scaling therefore happens before the projector, in vLLM after it. The newlines of pruned items are
removed, both after rows and after a video: they mark the ends of rows that are no longer complete.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
)
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.utils.torch_utils import async_tensor_h2d

from flashvlm_vllm.ipc.explain_request import WHOLE, Placed
from flashvlm_vllm.models.layouts.anyres import AnyresCounts
from flashvlm_vllm.models.layouts.crops import CropModel
from flashvlm_vllm.processing.family import NO_ARGUMENTS
from flashvlm_vllm.processing.processor import VisualTokenProcessor
from flashvlm_vllm.request.budget import TokenCount
from flashvlm_vllm.selection import Selector
from flashvlm_vllm.worker.candidates import Item, Part
from flashvlm_vllm.worker.feature_cache import ImageFeatures

_CACHED_SIZES = 128
"""Number of layouts cached by image size; each is at most 60 kB."""


class PrunedLlavaOnevisionProcessor(
    AnyresCounts, VisualTokenProcessor, LlavaOnevisionMultiModalProcessor
):
    """LLaVA-OneVision's processor: all frames of a video have the same number of tokens."""

    def count_video_tokens(
        self,
        frames: int,
        width: int,
        height: int,
        metadata: Mapping[str, Any] | None,
        arguments: Mapping[str, Any] = NO_ARGUMENTS,
    ) -> TokenCount:
        """Count a video's tokens; the newline after it is not selected from."""
        total = self.info.get_num_video_tokens(
            image_width=width, image_height=height, num_frames=frames
        )
        return TokenCount(total, total - 1, frames)

    def part_regions(
        self, modality: str, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> dict[int, Placed]:
        """Return the regions of frames, base crop and picture, each the whole image."""
        return {0: Placed(WHOLE), 1: Placed(WHOLE)}


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaOnevisionProcessor,
    info=LlavaOnevisionProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class PrunedLlavaOnevision(CropModel, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision with visual token selection."""

    uses: ClassVar[tuple[str, ...]] = (
        *CropModel.uses,
        "_parse_and_validate_video_input",
        "_merge_image_patch_embeddings",
        "apply_pooling",
    )

    def read_items(self, modality: str, kwargs: dict[str, Any]) -> list[Item]:
        """Read images (crops) or videos (frames)."""
        if modality == "image":
            return super().read_items(modality, kwargs)
        videos: Any = self._parse_and_validate_video_input(**kwargs)
        return self.items_of(list(videos["pixel_values_videos"]), modality)

    def encode(self, items: Sequence[Item], *, with_keys: bool) -> list[ImageFeatures]:
        """Run tower and projector; for videos features, saliency and keys are pooled too."""
        encoded = super().encode(items, with_keys=with_keys)
        if items[0].modality == "image":
            return encoded
        return [_each(self.apply_pooling, video) for video in encoded]

    def parts(self, item: Item, features: ImageFeatures, selector: Selector) -> list[Part]:
        """Return base crop and picture of an image, or all frames of a video.

        Spots of an image index the base crop's tokens first, then the picture's row by row.
        """
        if item.modality == "video":
            return super().parts(item, features, selector)
        parts, first = [], 0
        for number, crop in enumerate(self._laid_out(features, item.layout)):
            count = crop.saliency.numel()
            if not count:  # The picture of a very narrow image may have no patches.
                continue
            parts.append(
                Part(
                    projected=crop.projected[0],
                    features=crop.features[0],
                    saliency=crop.saliency[0],
                    keys=None if crop.keys is None else crop.keys[0],
                    places=self._places(number, item.layout, count, crop.saliency.device),
                    spots=first,
                    number=number,
                )
            )
            first += count
        return parts

    def whole_rows(self, item: Item, features: ImageFeatures) -> Tensor:
        """Return an item's embeddings with the newlines after its rows, or after a video."""
        if item.modality == "video":
            return torch.cat([features.projected.flatten(0, 1), self.image_newline[None]])
        whole: Tensor = self._merge_image_patch_embeddings(
            torch.tensor(item.layout),
            features.projected,
            image_newline=self.image_newline,
            strategy="spatial_unpad",
        )
        return whole

    def prompt_places(self, item: Item, spots: Tensor) -> Tensor:
        """Add the number of newlines before each token: one after every row of the picture."""
        if item.modality == "video":
            return spots
        return async_tensor_h2d(self._places_of(item.layout), spots.device)[spots]

    @cached_property
    def _places_of(self) -> Callable[[tuple[int, int]], Tensor]:
        # Image sizes recur.
        return lru_cache(maxsize=_CACHED_SIZES)(self._places_between_newlines)

    def _places_between_newlines(self, size: tuple[int, int]) -> Tensor:
        """Return the placeholder indices of an image's visual tokens, ``(N,)`` on the host."""
        return (self._laid_out_blank(size)[:, 0] == 0).nonzero().flatten()

    def _laid_out_blank(self, size: tuple[int, int]) -> Tensor:
        """Return vLLM's layout ``(n, 1)`` of an image of zeros in which newlines are ones."""
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        high, wide = get_anyres_image_grid_shape(
            size, self.config.image_grid_pinpoints, vision.image_size
        )
        laid_out: Tensor = self._merge_image_patch_embeddings(
            torch.tensor(size),
            torch.zeros(1 + high * wide, side * side, 1),
            image_newline=torch.ones(1),
            strategy="spatial_unpad",
        )
        return laid_out

    def _laid_out(self, image: ImageFeatures, size: tuple[int, int]) -> list[ImageFeatures]:
        """Return base crop and picture, ``(1, N, ...)`` each, in vLLM's layout of projections."""
        base = self.salient_tower.tokens
        if len(image.saliency) == 1:
            return [image]

        def lay_out(values: Tensor) -> Tensor:
            laid_out: Tensor = self._merge_image_patch_embeddings(
                torch.tensor(size), values, strategy="spatial_unpad"
            )
            return laid_out[None]

        whole = _each(lay_out, image)
        return [
            _each(lambda values: values[:, :base], whole),
            _each(lambda values: values[:, base:], whole),
        ]

    def _places(self, part: int, size: tuple[int, int], count: int, device: torch.device) -> Tensor:
        """Return rows and columns ``(count, 2)`` in the base crop's grid or in the picture's."""
        numbers = torch.arange(count, device=device)
        if part == 0:
            return self.grid_places(numbers)
        # Each row gets one newline, so the number of newlines is the number of rows.
        columns = count // int(self._laid_out_blank(size).sum())
        return torch.stack([numbers // columns, numbers % columns], dim=1)


def _each(change: Callable[[Tensor], Tensor], image: ImageFeatures) -> ImageFeatures:
    """Apply ``change`` to all tensors of an image, as ``(K, N, channels)``."""
    keys = image.keys
    return replace(
        image,
        features=change(image.features),
        projected=change(image.projected),
        saliency=change(image.saliency[..., None])[..., 0],
        keys=None if keys is None else change(keys.flatten(2)).unflatten(-1, keys.shape[2:]),
    )
