# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL: timestamps between a video's frames, and features from several layers of the tower.

The number of tokens kept of each frame is known only after the selection, after the prompt was
processed. So the worker embeds the whole placeholder of a pruned video, timestamps included, like
vLLM's own video pruning; here every embedding carries its exact position.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
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
from vllm.utils.torch_utils import async_tensor_h2d

from flashvlm_vllm.models.layouts.mrope import MRopeCounts, MRopeModel
from flashvlm_vllm.processing.family import NO_ARGUMENTS
from flashvlm_vllm.request.budget import TokenCount
from flashvlm_vllm.vision.merging_tower import Grid
from flashvlm_vllm.vllm_releases import video_arguments
from flashvlm_vllm.worker.candidates import Part
from flashvlm_vllm.worker.lora import adapted_embeddings, without_adapters
from flashvlm_vllm.worker.positioned_model import closed_items
from flashvlm_vllm.worker.positions import Span, grid_positions, with_places
from flashvlm_vllm.worker.pruned_model import PrunedModel

_CACHED_TIMES = 128


def clip_positions(
    before: Sequence[int], text: int, rows: int, columns: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the positions of an unpruned video's tokens, and which of them are visual tokens.

    Args:
        before: for each frame the number of text tokens before it, ascending.
        text: total number of text tokens.
        rows: number of token rows in a frame.
        columns: number of token columns in a frame.

    Returns:
        ``(S, 3)`` time, row and column relative to the video's base, and ``(S,)`` bool.

    """
    frame = grid_positions(1, rows, columns)
    parts, is_visual, written, base = [], [], 0, 0
    for passed in before:
        words = passed - written
        parts += [np.repeat(np.arange(base, base + words)[:, None], 3, axis=1)]
        base, written = base + words, passed
        parts += [frame + base]
        base += max(rows, columns)
        is_visual += [np.zeros(words, bool), np.ones(len(frame), bool)]
    parts += [np.repeat(np.arange(base, base + text - written)[:, None], 3, axis=1)]
    is_visual += [np.zeros(text - written, bool)]
    return np.concatenate(parts), np.concatenate(is_visual)


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


class Qwen3Model(MRopeModel):
    """Mixin of Qwen3-VL and later models. Derive from this first and from vLLM's model second."""

    uses: ClassVar[tuple[str, ...]] = PrunedModel.uses

    visual_dim: int
    language_model: Any
    _tokenizer: Any
    prunes_videos_itself = True

    def spans(self, input_tokens: list[int], mm_features: list[Any]) -> list[Span]:
        """Return the items in prompt order; text between a video's frames is part of the video."""
        side = self.visual_side
        spans = []
        closed = closed_items(mm_features)
        for each in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            offset, length = each.mm_position.offset, each.mm_position.length
            if offset in closed:
                continue
            steps, high, wide = each.data[f"{each.modality}_grid_thw"].data.tolist()
            if each.modality == "image":
                positions = grid_positions(steps, high // side, wide // side)
            else:
                ids = input_tokens[offset : offset + length]
                text = tuple(token for token in ids if token != self.config.video_token_id)
                positions, _ = self._clip(text, high // side, wide // side)
            spans.append(Span.of_grid(offset, length, positions))
        return spans

    @property
    def visual_side(self) -> int:
        """Patches along one side of a token."""
        return int(self.config.vision_config.spatial_merge_size)

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

    def laid_out(self, rows: Tensor, kept: Tensor, grid: Grid, time: Any) -> Tensor:
        """Return the embeddings of an item's placeholder, including a video's timestamps."""
        if time is None:
            return super().laid_out(rows, kept, grid, 1.0)
        text = self._text_of(time)
        _, high, wide = grid
        positions, is_visual = self._clip(text, high // self.visual_side, wide // self.visual_side)

        def on_device(values: Any) -> Tensor:
            return async_tensor_h2d(torch.as_tensor(values), rows.device)

        with without_adapters(adapted_embeddings(self.language_model)):
            words = self.language_model.embed_input_ids(on_device(text)).to(rows.dtype)
        # Text has no features for deeper layers.
        words = torch.nn.functional.pad(words, (0, rows.shape[1] - words.shape[1]))
        places = torch.cat(
            [on_device(np.flatnonzero(~is_visual)), on_device(np.flatnonzero(is_visual))[kept]]
        )
        order = places.argsort()
        together = torch.cat([words, rows])[order]
        return with_places(together, on_device(positions)[places[order]], int(positions.max()) + 1)

    def _text_of(self, seconds: tuple[float, ...]) -> tuple[int, ...]:
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

    def _clip(
        self, text: tuple[int, ...], rows: int, columns: int
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        start = self.config.vision_start_token_id
        before = tuple(number + 1 for number, token in enumerate(text) if token == start)
        return _cached_clip(before, len(text), rows, columns)


_cached_clip = lru_cache(maxsize=_CACHED_TIMES)(clip_positions)


class PrunedQwen3VLProcessor(Qwen3Counts, Qwen3VLMultiModalProcessor):
    """Qwen3-VL's processor."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3VLProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class PrunedQwen3VL(Qwen3Model, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with visual token selection."""
