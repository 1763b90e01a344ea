# SPDX-License-Identifier: Apache-2.0
"""GLM-4.1V, GLM-4.5V and 4.6V (a mixture of experts), and GLM-OCR."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from transformers.models.glm4v.video_processing_glm4v import smart_resize
from vllm.model_executor.models.glm4_1v import (
    Glm4vDummyInputsBuilder,
    Glm4vForConditionalGeneration,
    Glm4vMoeForConditionalGeneration,
    Glm4vMultiModalProcessor,
    Glm4vProcessingInfo,
)
from vllm.model_executor.models.glm_ocr import GlmOcrForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY

from flashvlm_vllm.models.layouts.clips import ClipModel
from flashvlm_vllm.models.layouts.text_between import (
    TextBetween,
    TextBetweenProcessor,
    texts_in,
)
from flashvlm_vllm.processing.family import NO_ARGUMENTS
from flashvlm_vllm.processing.placeholders import first_embeddings
from flashvlm_vllm.request.budget import TokenCount
from flashvlm_vllm.vision.convolving_tower import ConvolvingTower


class PrunedGlmProcessor(TextBetweenProcessor, Glm4vMultiModalProcessor):
    """GLM-4.1V's processor. A video's frames have their time after them."""

    text_between = "video"

    def count_image_tokens(
        self, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> TokenCount:
        """Count an image's tokens, as the Hugging Face processor does."""
        merged = self.info.ctx.get_merged_mm_kwargs(arguments)
        processor = self.info.get_image_processor(**arguments)
        patches = processor.get_number_of_image_patches(height, width, merged)
        total = int(patches) // processor.merge_size**2
        return TokenCount(total, total)

    def count_video_tokens(
        self,
        frames: int,
        width: int,
        height: int,
        metadata: Mapping[str, Any] | None,
        arguments: Mapping[str, Any] = NO_ARGUMENTS,
    ) -> TokenCount:
        """Count a video's tokens, as the Hugging Face processor does, which samples frames too."""
        known = dict(metadata or {})
        processor = self.info.get_video_processor(**arguments)
        steps = len(TextBetween.between(self._frames(frames, known), self.visual_token).before)
        if known.get("do_sample_frames", True):
            frames = steps * processor.temporal_patch_size
        # The processor's own count, `get_num_of_video_patches`, is not in Transformers 5.17.
        size = self.info.ctx.get_merged_mm_kwargs(arguments).get("size") or processor.size
        side = processor.patch_size * processor.merge_size
        high, wide = smart_resize(
            frames,
            height,
            width,
            temporal_factor=processor.temporal_patch_size,
            factor=side,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )
        grids = -(-frames // processor.temporal_patch_size)
        total = grids * (high // side) * (wide // side)
        return TokenCount(total, total, steps)

    def shorten_placeholder(self, whole: Any, count: TokenCount, keep: int) -> Any:
        """Shorten a placeholder; a list of token ids is an image's."""
        if isinstance(whole, list):
            return first_embeddings(whole, count, keep)
        return super().shorten_placeholder(whole, count, keep)

    @property
    def visual_token(self) -> int:
        """The id of a video's visual tokens, which are those of images."""
        token: int = self.info.get_hf_config().image_token_id
        return token

    def whole_placeholder(self, items: Any, number: int, arguments: Mapping[str, Any]) -> list[int]:
        """Return an unpruned video's placeholder, with one visual token per time step."""
        video, metadata = items.get(number)
        return self._frames(len(video), metadata)

    def _frames(self, frames: int, metadata: Mapping[str, Any]) -> list[int]:
        side = self.info.get_image_processor().merge_size
        placeholder: list[int] = self.info._construct_video_placeholder(
            range(frames), metadata, torch.tensor([1, side, side])
        )
        return placeholder


class GlmModel(ClipModel):
    """Mixin of GLM-4.1V and later models. Derive from this first and from vLLM's model second."""

    @cached_property
    def tower(self) -> ConvolvingTower:
        """The vision tower; an error if the model is loaded without it."""
        return ConvolvingTower(self.visual, self.layer)

    @property
    def frame_tokens(self) -> tuple[int, int]:
        """Token ids of the start of a frame and of a video's visual tokens."""
        return self.config.image_start_token_id, self.config.image_token_id

    def times(self, modality: str, kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the text of each pruned video; ``None`` for every other item."""
        return texts_in(kwargs) or [None] * len(kwargs[f"{modality}_grid_thw"])

    def text_of(self, time: TextBetween) -> tuple[int, ...]:
        """Return token ids of a video's placeholder without its visual tokens."""
        return time.ids


_register = MULTIMODAL_REGISTRY.register_processor(
    PrunedGlmProcessor, info=Glm4vProcessingInfo, dummy_inputs=Glm4vDummyInputsBuilder
)


@_register
class PrunedGlm(GlmModel, Glm4vForConditionalGeneration):
    """GLM-4.1V with visual token selection."""


@_register
class PrunedGlmMoe(GlmModel, Glm4vMoeForConditionalGeneration):
    """GLM-4.5V and 4.6V with visual token selection."""


@_register
class PrunedGlmOcr(GlmModel, GlmOcrForConditionalGeneration):
    """GLM-OCR with visual token selection."""
