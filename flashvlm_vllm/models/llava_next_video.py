# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT-Video: one video a prompt, which is all that vLLM serves of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import avg_pool2d
from vllm.model_executor.models.llava_next_video import (
    LlavaNextVideoDummyInputsBuilder,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoMultiModalProcessor,
    LlavaNextVideoProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from flashvlm_vllm.budget import TokenCount
from flashvlm_vllm.explained import Placed
from flashvlm_vllm.fields import KEPT, field_name
from flashvlm_vllm.models.kept import Kept
from flashvlm_vllm.models.llava import LlavaSelection
from flashvlm_vllm.models.memory import ImageFeatures
from flashvlm_vllm.models.pruning import Wanted
from flashvlm_vllm.models.regions import cropped
from flashvlm_vllm.processing import VisualTokenProcessor
from flashvlm_vllm.vision.tower import Encoded


class PrunedLlavaNextVideoProcessor(VisualTokenProcessor, LlavaNextVideoMultiModalProcessor):
    """LLaVA-NeXT-Video's processor: every frame has the tokens of its pooled grid."""

    def count_video_tokens(
        self, frames: int, width: int, height: int, metadata: Mapping[str, Any] | None
    ) -> TokenCount:
        """Count a video's tokens."""
        total = self.info.get_num_video_tokens(
            image_width=width, image_height=height, num_frames=frames
        )
        return TokenCount(total, total, frames)

    def places_of_parts(self, modality: str, width: int, height: int) -> dict[int, Placed]:
        """Tell what of the frames is left."""
        return cropped(self.info.get_hf_processor().video_processor, width, height)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaNextVideoProcessor,
    info=LlavaNextVideoProcessingInfo,
    dummy_inputs=LlavaNextVideoDummyInputsBuilder,
)
class PrunedLlavaNextVideo(LlavaSelection, LlavaNextVideoForConditionalGeneration):
    """LLaVA-NeXT-Video that keeps, of each video, the tokens its request's question selects."""

    def get_mm_lora_token_counts(
        self, *, modality: str, mm_kwargs: Any, num_mm_embeds: int
    ) -> tuple[int, int | None]:
        """Count what an adapter on the tower or the projector sees: whole videos."""
        if mm_kwargs is not None and field_name(KEPT, modality) in mm_kwargs:
            frames = mm_kwargs["pixel_values_videos"].data.shape[-4]
            num_mm_embeds = frames * self.pooled_grid_length**2
        counts: tuple[int, int | None] = super().get_mm_lora_token_counts(
            modality=modality, mm_kwargs=mm_kwargs, num_mm_embeds=num_mm_embeds
        )
        return counts

    def read_pixels(
        self, modality: str, kwargs: dict[str, Any]
    ) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """Return the frames ``(K, 3, H, W)`` of each video."""
        videos: Any = self._parse_and_validate_video_input(**kwargs)
        return list(videos["pixel_values_videos"]), []

    def encode_crops(self, pixels: Tensor, *, with_keys: bool) -> Encoded:
        """Run tower and resampler; saliency and keys are averaged over what it pools."""
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

    def embed_batch(
        self,
        images: Sequence[ImageFeatures],
        sizes: Sequence[tuple[int, int]],
        wanted: Wanted,
        text: Sequence[Tensor | None],
    ) -> list[Kept]:
        """Select of a few videos together."""
        return self.embed_clips(images, wanted, text)
