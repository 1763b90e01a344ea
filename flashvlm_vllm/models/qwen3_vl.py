# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL: timestamps between a video's frames, and features from several layers of the tower."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.video_utils import VideoMetadata
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptUpdateDetails

from flashvlm_vllm.models.layouts.clips import ClipModel
from flashvlm_vllm.models.layouts.mrope import MRopeCounts
from flashvlm_vllm.processing.family import NO_ARGUMENTS
from flashvlm_vllm.request.budget import TokenCount
from flashvlm_vllm.vllm_releases import video_arguments
from flashvlm_vllm.worker.candidates import Part
from flashvlm_vllm.worker.pruned_model import PrunedModel


class Qwen3Counts(MRopeCounts):
    """Mixin of a processor whose videos have timestamps between their frames."""

    def count_video_tokens(
        self,
        frames: int,
        width: int,
        height: int,
        metadata: Mapping[str, Any] | None,
        arguments: Mapping[str, Any] = NO_ARGUMENTS,
    ) -> TokenCount:
        """Count a video's visual tokens, without timestamps and frame markers."""
        frames = self._sampled(frames, metadata, arguments)
        processor = self.info.get_video_processor(**arguments)
        total = self.info.get_num_video_tokens(
            image_width=width,
            image_height=height,
            num_frames=frames,
            image_processor=processor,
            mm_kwargs=arguments,
        )
        together = self.info.get_hf_config().vision_config.temporal_patch_size
        return TokenCount(total, total, max(1, -(-frames // together)))

    def _sampled(
        self, frames: int, metadata: Mapping[str, Any] | None, arguments: Mapping[str, Any]
    ) -> int:
        """Return the number of frames that the Hugging Face processor samples from vLLM's."""
        own = video_arguments(self.info, arguments)
        known = dict(metadata or {})
        samples = known.pop("do_sample_frames", False)
        if not own.get("do_sample_frames", samples):
            return frames
        number = own.get("num_frames")
        rate = None if number is not None else own.get("fps")
        indices = self.info.get_video_processor().sample_frames(
            metadata=VideoMetadata(**known), num_frames=number, fps=rate
        )
        return len(indices)

    def shorten_placeholder(self, whole: Any, count: TokenCount, keep: int) -> Any:
        """Shorten a placeholder. A pruned video's text gets embeddings too.

        The number of tokens kept of each frame is not known yet: here all of them are in the first
        frame, and the worker puts them in their frames.
        """
        if isinstance(whole, list) or keep == count.total:
            return super().shorten_placeholder(whole, count, keep) if keep < count.total else whole
        config = self.info.get_hf_config()
        text = [token for token in whole.full if token != config.video_token_id]
        if text.count(config.vision_start_token_id) != count.floor:
            raise TypeError("the number of frames in vLLM's placeholder differs from the count")
        first = text.index(config.vision_start_token_id) + 1
        return PromptUpdateDetails.from_seq(
            [*text[:first], *[config.video_token_id] * keep, *text[first:]]
        )

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Return profiling inputs that include a video's text, which a pruned video embeds too."""
        inputs = super().get_dummy_mm_inputs(*args, **kwargs)
        placeholders: Any = inputs["mm_placeholders"]
        if "video" in placeholders:
            placeholders["video"] = [
                replace(placeholder, is_embed=None) for placeholder in placeholders["video"]
            ]
        return inputs


class Qwen3Model(ClipModel):
    """Mixin of Qwen3-VL and later models. Derive from this first and from vLLM's model second."""

    uses: ClassVar[tuple[str, ...]] = PrunedModel.uses

    visual_dim: int
    _tokenizer: Any
    prunes_videos_itself = True

    @property
    def frame_tokens(self) -> tuple[int, int]:
        """Token ids of the start of a frame and of a video's visual tokens."""
        return self.config.vision_start_token_id, self.config.video_token_id

    def times(self, modality: str, kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the timestamps of each video's frames in seconds; ``None`` for an image."""
        if modality == "image":
            return [None] * len(kwargs["image_grid_thw"])
        return [
            tuple(torch.as_tensor(seconds).flatten().tolist()) for seconds in kwargs["timestamps"]
        ]

    def into_first_layer(self, projected: Tensor) -> Tensor:
        """Return the projections without the features for deeper layers."""
        return projected[..., : self.visual_dim]

    def added_after_first_layer(self, part: Part) -> Tensor | None:
        """Return the features of the tower's first tapped layer, which this layer adds."""
        rows = part.embeddings
        if rows is None or rows.shape[1] < 2 * self.visual_dim:
            return None
        return rows[:, self.visual_dim : 2 * self.visual_dim]

    def text_of(self, seconds: tuple[float, ...]) -> tuple[int, ...]:
        """Return token ids of timestamps and frame markers of a video, without visual tokens."""
        details = Qwen3VLMultiModalProcessor.get_video_repl(
            tokens_per_frame=[0] * len(seconds),
            timestamps=seconds,
            tokenizer=self._tokenizer,
            vision_start_token_id=self.config.vision_start_token_id,
            vision_end_token_id=self.config.vision_end_token_id,
            video_token_id=self.config.video_token_id,
        )
        return tuple(details.full)


class PrunedQwen3VLProcessor(Qwen3Counts, Qwen3VLMultiModalProcessor):
    """Qwen3-VL's processor."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3VLProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class PrunedQwen3VL(Qwen3Model, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with visual token selection."""
