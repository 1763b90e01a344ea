# SPDX-License-Identifier: Apache-2.0
"""Text between a video's frames, such as ``Frame1: <img>``, when frames keep unlike many tokens.

How many tokens of each frame stay is known only after the selection, long after the prompt was
written. So the whole stretch from the first frame's text to the last frame's end is embedded by
the worker, text included, each text token where it belongs.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d


@dataclass(frozen=True)
class FrameText:
    """What stands before, between and after the tokens of ``T`` frames."""

    ids: tuple[int, ...]
    """The text, ``M`` tokens."""
    before: tuple[int, ...]
    """Per frame how many of the text tokens stand before its visual tokens, ascending."""

    @classmethod
    def between(cls, placeholder: list[int], visual: int) -> Self:
        """Read the text off a video's placeholder.

        Args:
            placeholder: text tokens and, for each frame, a run of the token ``visual``.
            visual: the id that stands for a visual token.

        """
        ids: list[int] = []
        before: list[int] = []
        last = None
        for token in placeholder:
            if token != visual:
                ids.append(token)
            elif last != visual:
                before.append(len(ids))
            last = token
        return cls(tuple(ids), tuple(before))

    def to_tensor(self) -> Tensor:
        """Return it as one int64 tensor for the way to the worker."""
        return torch.tensor([len(self.before), *self.before, *self.ids], dtype=torch.int64)

    @classmethod
    def from_tensor(cls, packed: Tensor) -> Self:
        """Undo ``to_tensor``."""
        frames, *values = packed.flatten().tolist()
        return cls(tuple(values[frames:]), tuple(values[:frames]))

    def interleave(self, text: Tensor, rows: Tensor, frame_of_row: Tensor) -> Tensor:
        """Put text and visual tokens in the order of the prompt, without waiting for a device.

        Args:
            text: ``(M, D)`` embeddings of ``ids``.
            rows: ``(N, D)`` visual tokens, frame by frame.
            frame_of_row: ``(N,)`` int64, ascending.

        Returns:
            ``(M + N, D)``.

        """
        device = rows.device
        before = async_tensor_h2d(torch.tensor(self.before), device)
        numbers = torch.arange(max(len(text), len(rows)), device=device)
        # Frames whose visual tokens stand before each text token, then those tokens.
        frames_passed = torch.searchsorted(before, numbers[: len(text)], right=True)
        rows_passed = torch.searchsorted(frame_of_row, frames_passed)
        together = rows.new_empty(len(text) + len(rows), rows.shape[1])
        together[numbers[: len(rows)] + before[frame_of_row]] = rows
        together[numbers[: len(text)] + rows_passed] = text.to(rows.dtype)
        return together
