# SPDX-License-Identifier: Apache-2.0
"""A prompt of one item and its question, for selectors that use the language model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
    passing: Tensor
    """``(M,)`` int64 indices of the visual tokens that pass the first layer, ascending."""
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

    def carried(self) -> Carried:
        """Return the tokens that pass the first layer: the words, and all or some visual ones."""
        first, whole = len(self.before), len(self.visual)
        words = torch.arange(len(self) - whole, device=self.passing.device)
        places = torch.cat([words[:first], self.passing + first, words[first:] + whole])
        return Carried(places, first, len(self.passing))

    def left_out(self) -> Tensor:
        """Return the places of the other visual tokens in the prompt, int64, ascending."""
        is_passing = torch.zeros_like(self.positions[:, 0]).index_fill_(0, self.passing, 1)
        # A stable sort: counting the others would make the host wait for the device.
        order = is_passing.argsort(stable=True)
        return order[: len(order) - len(self.passing)] + len(self.before)


@dataclass(frozen=True)
class Carried:
    """Tokens of a prompt that pass the first layer."""

    places: Tensor
    """``(m,)`` int64 places in the prompt, ascending."""
    before: int
    """Number of words before the visual tokens."""
    visual: int
    """Number of visual tokens among them."""

    def __len__(self) -> int:
        return len(self.places)

    @property
    def image(self) -> slice:
        """Rows of the visual tokens."""
        return slice(self.before, self.before + self.visual)

    def words(self) -> Tensor:
        """Return the rows of the words, int64."""
        words = torch.arange(len(self) - self.visual, device=self.places.device)
        return torch.cat([words[: self.before], words[self.before :] + self.visual])


def in_row(rows: Iterable[Tensor], lengths: Sequence[int]) -> Tensor:
    """Return rows of sequences that lie one after another, from the rows in each."""
    return torch.cat([own + start for own, start in zip(rows, _starts(lengths), strict=True)])


def _starts(lengths: Sequence[int]) -> Iterator[int]:
    start = 0
    for length in lengths:
        yield start
        start += length
