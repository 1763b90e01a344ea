# SPDX-License-Identifier: Apache-2.0
"""A prompt of one item and its question, for selectors that use the language model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One item in a prompt of its own: the start of the user's turn, the item, the question."""

    visual: Tensor
    """``(N, D)`` input embeddings of all tokens of the item."""
    before: Tensor
    """``(P, D)`` input embeddings of the words before them."""
    after: Tensor
    """``(R, D)`` input embeddings of the words after them, R >= 1."""
    question_words: int
    """Number of rows of ``after`` that are the question's, the first ones."""
    positions: Tensor
    """``(N, axes)`` int64 position of each token relative to the item's start; 1 or 3 axes."""
    deeper: Tensor | None = None
    """``(N, D)`` features that the model adds after its first layer; ``None`` if it adds none."""

    def __len__(self) -> int:
        return len(self.before) + len(self.visual) + len(self.after)

    def embeddings(self) -> Tensor:
        """Return ``(n, D)``."""
        return torch.cat([self.before, self.visual, self.after])

    def all_positions(self) -> Tensor:
        """Return ``(axes, n)`` int64 positions."""
        first, device = len(self.before), self.positions.device
        extent = self.positions.amax() + 1
        text = torch.arange(first + len(self.after), device=device)
        text = text.view(-1, 1).expand(-1, self.positions.shape[1])
        return torch.cat([text[:first], self.positions + first, text[first:] + extent]).T

    def added(self) -> Tensor:
        """Return ``(n, D)``: ``deeper`` at the visual tokens, zeros elsewhere."""
        if self.deeper is None:
            return torch.zeros_like(self.embeddings())
        zeros = torch.zeros_like
        return torch.cat([zeros(self.before), self.deeper, zeros(self.after)])


def word_rows(prompts: Sequence[Prompt], device: torch.device) -> Tensor:
    """Return the places of all words in prompts that lie one after another, int64."""
    rows, start = [], 0
    for each in prompts:
        end, visual = start + len(each), start + len(each.before)
        rows += [
            torch.arange(start, visual, device=device),
            torch.arange(visual + len(each.visual), end, device=device),
        ]
        start = end
    return torch.cat(rows)
