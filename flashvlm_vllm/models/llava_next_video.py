# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT-Video; vLLM serves one video per prompt, and no images."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import avg_pool2d
from vllm.model_executor.models.llava_next_video import (
    LlavaNextVideoDummyInputsBuilder,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoMultiModalProcessor,
    LlavaNextVideoProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from flashvlm_vllm.ipc.explain_request import Placed
from flashvlm_vllm.models.layouts.crops import CropModel
from flashvlm_vllm.models.layouts.regions import cropped
from flashvlm_vllm.processing.family import NO_ARGUMENTS
from flashvlm_vllm.processing.processor import VisualTokenProcessor
from flashvlm_vllm.request.budget import TokenCount
from flashvlm_vllm.vision.clip_siglip import Encoded
from flashvlm_vllm.worker.candidates import Item


class PrunedLlavaNextVideoProcessor(VisualTokenProcessor, LlavaNextVideoMultiModalProcessor):
    """LLaVA-NeXT-Video's processor: every frame has the tokens of a pooled grid."""

    def count_video_tokens(
        self,
        frames: int,
        width: int,
        height: int,
        metadata: Mapping[str, Any] | None,
        arguments: Mapping[str, Any] = NO_ARGUMENTS,
    ) -> TokenCount:
        """Count a video's tokens."""
        total = self.info.get_num_video_tokens(
            image_width=width, image_height=height, num_frames=frames
        )
        return TokenCount(total, total, frames)

    def part_regions(
        self, modality: str, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> dict[int, Placed]:
        """Return the part of the frames that the tower encodes."""
        return cropped(self.info.get_hf_processor().video_processor, width, height)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaNextVideoProcessor,
    info=LlavaNextVideoProcessingInfo,
    dummy_inputs=LlavaNextVideoDummyInputsBuilder,
)
class PrunedLlavaNextVideo(CropModel, LlavaNextVideoForConditionalGeneration):
    """LLaVA-NeXT-Video with visual token selection."""

    uses: ClassVar[tuple[str, ...]] = ("embed_multimodal", "_parse_and_validate_video_input")

    def read_items(self, modality: str, kwargs: dict[str, Any]) -> list[Item]:
        """Read videos, one crop per frame."""
        videos: Any = self._parse_and_validate_video_input(**kwargs)
        return self.items_of(list(videos["pixel_values_videos"]), modality)

    def encode_crops(self, pixels: Tensor, *, with_keys: bool) -> Encoded:
        """Run tower and resampler; saliency and keys are averaged over the pooled patches."""
        encoded = self.salient_tower.run(
            lambda frames: self.vision_tower(
                frames, feature_select_strategy=self.config.vision_feature_select_strategy
            ),
            pixels,
            with_keys=with_keys,
        )
        keys = encoded.keys
        return Encoded(
            self.vision_resampler(encoded.features),
            self._averaged(encoded.saliency[..., None])[..., 0],
            None if keys is None else self._averaged(keys.flatten(2)).unflatten(2, keys.shape[2:]),
        )

    def _averaged(self, values: Tensor) -> Tensor:
        """Average ``(B, N, channels)`` over the squares of patches that the resampler pools."""
        side = self.patch_grid_length
        grid = values.unflatten(1, (side, side)).movedim(-1, 1)
        pooled = avg_pool2d(grid, self.config.spatial_pool_stride)
        return pooled.flatten(2).transpose(1, 2)
