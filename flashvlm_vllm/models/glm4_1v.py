# SPDX-License-Identifier: Apache-2.0
"""GLM-4.1V: images are pruned, and kept tokens keep their 3-D positions; videos are kept whole."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from vllm.model_executor.models.glm4_1v import (
    Glm4vDummyInputsBuilder,
    Glm4vForConditionalGeneration,
    Glm4vMultiModalProcessor,
    Glm4vProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import MultiModalDataItems

from flashvlm_vllm.models.layouts.mrope import MRopeModel
from flashvlm_vllm.processing.family import NO_ARGUMENTS
from flashvlm_vllm.processing.processor import VisualTokenProcessor
from flashvlm_vllm.request.budget import BUDGET, TokenCount
from flashvlm_vllm.request.read_request import VisualRequest
from flashvlm_vllm.request.refusal import Reason, Refusal
from flashvlm_vllm.vision.convolving_tower import ConvolvingTower
from flashvlm_vllm.worker.positioned_model import closed_items
from flashvlm_vllm.worker.positions import Span, grid_positions


class PrunedGlmProcessor(VisualTokenProcessor, Glm4vMultiModalProcessor):
    """GLM-4.1V's processor."""

    prunes_videos = False

    def count_image_tokens(
        self, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> TokenCount:
        """Count an image's tokens, as the Hugging Face processor does."""
        merged = self.info.ctx.get_merged_mm_kwargs(arguments)
        processor = self.info.get_image_processor(**arguments)
        patches = processor.get_number_of_image_patches(height, width, merged)
        total = int(patches) // processor.merge_size**2
        return TokenCount(total, total)

    def own_request(self, request: VisualRequest, items: MultiModalDataItems) -> VisualRequest:
        """Return the request; a default budget does not apply to a prompt with a video.

        Images beside a video are pruned if their content parts have a budget.

        Raises:
            Refusal: the request has a budget and a video, or the video has one.

        """
        if not items.get("video"):
            return request
        own = request.items.get("video", ())
        if request.budget is not None or any(each.budget is not None for each in own):
            raise Refusal(
                Reason.NOT_COVERED,
                f"{BUDGET}: for this model images are pruned and videos are not; send the "
                f"video with {BUDGET}: null, or images without a video",
                parameter=BUDGET,
            )
        return replace(request, has_budget=True)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedGlmProcessor, info=Glm4vProcessingInfo, dummy_inputs=Glm4vDummyInputsBuilder
)
class PrunedGlm(MRopeModel, Glm4vForConditionalGeneration):
    """GLM-4.1V with visual token selection for images."""

    @cached_property
    def tower(self) -> ConvolvingTower:
        """The vision tower; an error if the model is loaded without it."""
        return ConvolvingTower(self.visual, self.layer)

    def spans(self, input_tokens: list[int], mm_features: list[Any]) -> list[Span]:
        """Return the prompt's images and the frames of its videos, which have text in between."""
        side = int(self.config.vision_config.spatial_merge_size)
        spans = []
        closed = closed_items(mm_features)
        for each in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            place = each.mm_position
            if place.offset in closed:
                continue
            steps, high, wide = each.data[f"{each.modality}_grid_thw"].data.tolist()
            runs = [(place.offset, place.offset + place.length - 1)]
            if each.modality == "video":
                runs = place.extract_embeds_range()
            # vLLM's memory profiling writes a video's frames as one run of tokens.
            grid = grid_positions(steps // len(runs), high // side, wide // side)
            spans += [Span.of_grid(start, end - start + 1, grid) for start, end in runs]
        return spans
