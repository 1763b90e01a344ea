# SPDX-License-Identifier: Apache-2.0
"""Video-LLaVA with visual token selection."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.models.clip import CLIPVisionModel
from vllm.multimodal import MULTIMODAL_REGISTRY

from flashvlm_vllm.ipc.explain_request import Placed
from flashvlm_vllm.models.layouts.crops import CropModel
from flashvlm_vllm.models.layouts.regions import cropped
from flashvlm_vllm.models.video_llava.architecture import (
    VideoLlavaDummyInputsBuilder,
    VideoLlavaForConditionalGeneration,
    VideoLlavaMultiModalProcessor,
    VideoLlavaProcessingInfo,
)
from flashvlm_vllm.processing.family import NO_ARGUMENTS
from flashvlm_vllm.processing.processor import VisualTokenProcessor
from flashvlm_vllm.request.budget import TokenCount
from flashvlm_vllm.selection import Selector
from flashvlm_vllm.vision.clip_siglip import SalientTower
from flashvlm_vllm.worker.candidates import Item, Part
from flashvlm_vllm.worker.feature_cache import ImageFeatures


class PrunedVideoLlavaProcessor(VisualTokenProcessor, VideoLlavaMultiModalProcessor):
    """Video-LLaVA's processor: a pruned video loses the class tokens of its frames."""

    def count_video_tokens(
        self,
        frames: int,
        width: int,
        height: int,
        metadata: Mapping[str, Any] | None,
        arguments: Mapping[str, Any] = NO_ARGUMENTS,
    ) -> TokenCount:
        """Count a video's tokens; the selection chooses from the patches."""
        tokens = self.info.get_num_frame_tokens()
        return TokenCount(frames * tokens, frames * (tokens - 1), frames)

    def part_regions(
        self, modality: str, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> dict[int, Placed]:
        """Return the part of images and frames that the towers encode; both are cropped."""
        processor = self.info.get_hf_processor()
        part = processor.image_processor if modality == "image" else processor.video_processor
        return cropped(part, width, height)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedVideoLlavaProcessor,
    info=VideoLlavaProcessingInfo,
    dummy_inputs=VideoLlavaDummyInputsBuilder,
)
class PrunedVideoLlava(CropModel, VideoLlavaForConditionalGeneration):
    """Video-LLaVA with visual token selection."""

    @cached_property
    def _salient_towers(self) -> dict[str, SalientTower]:
        # A tower does not exist if its modality is limited to 0 items.
        towers = {modality: getattr(self, f"{modality}_tower") for modality in ("image", "video")}
        return {
            modality: SalientTower(tower, self.config)
            for modality, tower in towers.items()
            if isinstance(tower, CLIPVisionModel)
        }

    @cached_property
    def salient_tower(self) -> SalientTower:
        """One of the towers; both have the same number of patches."""
        return next(iter(self._salient_towers.values()))

    uses: ClassVar[tuple[str, ...]] = ("embed_multimodal", "pixels_of", "see")

    def read_items(self, modality: str, kwargs: dict[str, Any]) -> list[Item]:
        """Read images or videos; their sizes are not needed."""
        return self.items_of(self.pixels_of(modality, kwargs), modality)

    def encode(self, items: Sequence[Item], *, with_keys: bool) -> list[ImageFeatures]:
        """Run the modality's tower, and the projector.

        Saliency and keys are those of patches. Features of a video frame start with the class
        token, which a video that is kept whole needs.
        """
        modality = items[0].modality
        pixels = [each.pixels for each in items]
        encoded = self._salient_towers[modality].run(
            lambda each: self.see(each, modality), torch.cat(pixels), with_keys=with_keys
        )
        projected = self.multi_modal_projector(encoded.features)
        batch = ImageFeatures(encoded.features, projected, encoded.saliency, encoded.keys)
        return batch.split([len(each) for each in pixels])

    def parts(self, item: Item, features: ImageFeatures, selector: Selector) -> list[Part]:
        """Return the patches as one part."""
        return super().parts(item, _patches_of(features), selector)

    def whole_rows(self, item: Item, features: ImageFeatures) -> Tensor:
        """Return an item's embeddings with the class tokens of its frames."""
        return features.projected.flatten(0, 1)

    def prompt_places(self, item: Item, spots: Tensor) -> Tensor:
        """Add the number of class tokens before each token: one per frame of a video."""
        if item.modality == "image":
            return spots
        return spots + spots // self.salient_tower.tokens + 1


def _patches_of(image: ImageFeatures) -> ImageFeatures:
    """Return the features without class tokens."""
    patches = image.saliency.shape[1]
    return replace(
        image, features=image.features[:, -patches:], projected=image.projected[:, -patches:]
    )
