# SPDX-License-Identifier: Apache-2.0
"""Models with M-RoPE and text between a video's frames, such as timestamps.

The number of tokens kept of each frame is known only after the selection, after the prompt was
processed. So the worker embeds the whole placeholder of a pruned video, timestamps included, like
vLLM's own video pruning; here every embedding carries its exact position.
"""

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from flashvlm_vllm.models.layouts.mrope import MRopeModel
from flashvlm_vllm.vision.merging_tower import Grid
from flashvlm_vllm.worker.lora import adapted_embeddings, without_adapters
from flashvlm_vllm.worker.positioned_model import closed_items
from flashvlm_vllm.worker.positions import Span, grid_positions, with_places

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


class ClipModel(MRopeModel):
    """Mixin of a model with M-RoPE whose videos have text between their frames.

    The time of an item (`MRopeModel.times`) is ``None`` for an image; for a video it is what
    `text_of` needs.
    """

    @property
    @abstractmethod
    def frame_tokens(self) -> tuple[int, int]:
        """Token ids of the start of a frame and of a video's visual tokens."""

    @abstractmethod
    def text_of(self, time: Any) -> tuple[int, ...]:
        """Return token ids of a video's placeholder without its visual tokens."""

    @property
    def visual_side(self) -> int:
        """Patches along one side of a token."""
        return int(self.config.vision_config.spatial_merge_size)

    def spans(self, input_tokens: list[int], mm_features: list[Any]) -> list[Span]:
        """Return the items in prompt order; text between a video's frames is part of the video."""
        side = self.visual_side
        start, visual = self.frame_tokens
        spans = []
        closed = closed_items(mm_features)
        for each in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            offset, length = each.mm_position.offset, each.mm_position.length
            if offset in closed:
                continue
            steps, high, wide = each.data[f"{each.modality}_grid_thw"].data.tolist()
            ids = input_tokens[offset : offset + length]
            # vLLM's memory profiling writes a video's frames as one run of tokens.
            if each.modality == "image" or start not in ids:
                positions = grid_positions(steps, high // side, wide // side)
            else:
                text = tuple(token for token in ids if token != visual)
                positions, _ = self._clip(text, high // side, wide // side)
            spans.append(Span.of_grid(offset, length, positions))
        return spans

    def laid_out(self, rows: Tensor, kept: Tensor, grid: Grid, time: Any) -> Tensor:
        """Return the embeddings of an item's placeholder, including a video's timestamps."""
        if time is None:
            return super().laid_out(rows, kept, grid, 1.0)
        text = self.text_of(time)
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

    def _clip(
        self, text: tuple[int, ...], rows: int, columns: int
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        start, _ = self.frame_tokens
        before = tuple(number + 1 for number, token in enumerate(text) if token == start)
        return _cached_clip(before, len(text), rows, columns)


_cached_clip = lru_cache(maxsize=_CACHED_TIMES)(clip_positions)
