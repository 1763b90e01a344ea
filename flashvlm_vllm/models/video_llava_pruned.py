# SPDX-License-Identifier: Apache-2.0
"""Video-LLaVA whose images and videos are pruned."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.clip import CLIPVisionModel
from vllm.multimodal import MULTIMODAL_REGISTRY

from flashvlm_vllm.budget import TokenCount
from flashvlm_vllm.explained import Placed
from flashvlm_vllm.fields import MODALITIES
from flashvlm_vllm.models.kept import Kept
from flashvlm_vllm.models.llava import LlavaSelection
from flashvlm_vllm.models.memory import ImageFeatures
from flashvlm_vllm.models.pruning import Wanted
from flashvlm_vllm.models.regions import cropped
from flashvlm_vllm.models.video_llava import (
    VideoLlavaDummyInputsBuilder,
    VideoLlavaForConditionalGeneration,
    VideoLlavaMultiModalProcessor,
    VideoLlavaProcessingInfo,
)
from flashvlm_vllm.processing import VisualTokenProcessor
from flashvlm_vllm.vision.tower import SalientTower


class PrunedVideoLlavaProcessor(VisualTokenProcessor, VideoLlavaMultiModalProcessor):
    """Video-LLaVA's processor: the class tokens of frames go as soon as a video is pruned."""

    def count_video_tokens(
        self, frames: int, width: int, height: int, metadata: Mapping[str, Any] | None
    ) -> TokenCount:
        """Count a video's tokens; the selection chooses of the patches."""
        tokens = self.info.get_num_frame_tokens()
        return TokenCount(frames * tokens, frames * (tokens - 1), frames)

    def places_of_parts(self, modality: str, width: int, height: int) -> dict[int, Placed]:
        """Tell what of images and frames is left: both are cropped."""
        processor = self.info.get_hf_processor()
        part = processor.image_processor if modality == "image" else processor.video_processor
        return cropped(part, width, height)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedVideoLlavaProcessor,
    info=VideoLlavaProcessingInfo,
    dummy_inputs=VideoLlavaDummyInputsBuilder,
)
class PrunedVideoLlava(LlavaSelection, VideoLlavaForConditionalGeneration):
    """Video-LLaVA that keeps, of each item, the tokens its request's question selects."""

    @cached_property
    def _salient_towers(self) -> dict[str, SalientTower]:
        # A tower whose modality is limited to 0 is not there.
        towers = {modality: getattr(self, f"{modality}_tower") for modality in MODALITIES}
        return {
            modality: SalientTower(tower, self.config)
            for modality, tower in towers.items()
            if isinstance(tower, CLIPVisionModel)
        }

    @cached_property
    def salient_tower(self) -> SalientTower:
        """One of the towers; they see as many patches."""
        return next(iter(self._salient_towers.values()))

    def read_pixels(
        self, modality: str, kwargs: dict[str, Any]
    ) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """Return each item's pixels; sizes are not asked for."""
        return self.pixels_of(modality, kwargs), []

    def encode(
        self, pixels: Sequence[Tensor], modality: str, *, with_keys: bool
    ) -> list[ImageFeatures]:
        """Run the modality's tower, and the projector.

        Saliency and keys are of the patches; features of a video's frames begin with the class
        token, which a video that is kept whole needs.
        """
        encoded = self._salient_towers[modality].run(
            lambda each: self.see(each, modality), torch.cat(list(pixels)), with_keys=with_keys
        )
        projected = self.multi_modal_projector(encoded.features)
        batch = ImageFeatures(encoded.features, projected, encoded.saliency, encoded.keys)
        return batch.split([len(each) for each in pixels])

    def embed_batch(
        self,
        images: Sequence[ImageFeatures],
        sizes: Sequence[tuple[int, int]],
        wanted: Wanted,
        text: Sequence[Tensor | None],
    ) -> list[Kept]:
        """Select of a few images, or of a few videos, together; spots count patches."""
        kept = self.embed_clips([_patches_of(each) for each in images], wanted, text)
        for number, image in enumerate(images):
            if wanted.kept[number] > image.saliency.numel():
                # Kept whole beside a longer video of the same request: with its class tokens.
                kept[number] = replace(kept[number], rows=image.projected.flatten(0, 1))
        return kept

    def places_in_prompt(
        self, spots: Tensor, size: tuple[int, int] | None, modality: str
    ) -> Tensor:
        """Count the class tokens before each: one before every frame of a video."""
        if modality == "image":
            return spots
        return spots + spots // self.salient_tower.tokens + 1


def _patches_of(image: ImageFeatures) -> ImageFeatures:
    """Leave out the class tokens, if there are any."""
    patches = image.saliency.shape[1]
    return replace(
        image, features=image.features[:, -patches:], projected=image.projected[:, -patches:]
    )
