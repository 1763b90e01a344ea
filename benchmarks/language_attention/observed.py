# SPDX-License-Identifier: Apache-2.0
"""What the words of a prompt attend to in every layer of the small VLM, on Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.accuracy.layer_attention import LayerAttention, attention_of
from benchmarks.accuracy.reference import AFTER, BEFORE, CHECKERBOARD, PLACES, Reference, Seen


class Observed:
    """One picture and question, as variants of the selector see them.

    Attributes:
        seen: the picture.
        text: (L, D) raw embeddings of the question's words.

    """

    def __init__(self, reference: Reference, seen: Seen, question: str) -> None:
        self.seen, self.text = seen, reference.words(question)
        self._language = reference.language
        self._before, self._after = reference.words(BEFORE), reference.words(AFTER)

    @cached_property
    def layers(self) -> Sequence[LayerAttention]:
        """Rows: the question's words, then those of the template up to the answer."""
        return self._read(self._before, self.text)

    @cached_property
    def bare(self) -> Sequence[LayerAttention]:
        """The same without the words before the picture."""
        return self._read(self._before[:0], self.text)

    @cached_property
    def empty(self) -> Sequence[LayerAttention]:
        """The same without a question: rows of the template only."""
        return self._read(self._before, self.text[:0])

    @cached_property
    def after_first(self) -> Sequence[LayerAttention]:
        """The same with visual tokens that pass the first layer only."""
        return self._read(self._before, self.text, 1)

    @cached_property
    def as_projected(self) -> Sequence[LayerAttention]:
        """The same with visual tokens that pass no layer."""
        return self._read(self._before, self.text, 0)

    @cached_property
    def checkerboard(self) -> Sequence[LayerAttention]:
        """The same with half of the visual tokens in the first layer; the others are not read."""
        return self._read(self._before, self.text, 1, CHECKERBOARD)

    @cached_property
    def columns(self) -> Sequence[LayerAttention]:
        """The same with every other column of visual tokens."""
        return self._read(self._before, self.text, 1, (PLACES[:, 1] % 2 == 0).nonzero()[:, 0])

    @cached_property
    def quarter(self) -> Sequence[LayerAttention]:
        """The same with every other column of every other row."""
        return self._read(self._before, self.text, 1, (PLACES % 2 == 0).all(dim=1).nonzero()[:, 0])

    @cached_property
    def alone(self) -> Sequence[LayerAttention]:
        """The checkerboard's tokens without the others, which give no keys to the first layer."""
        return self._read(self._before, self.text, 1, CHECKERBOARD, alone=True)

    @property
    def words(self) -> int:
        """Number of rows of the question's words."""
        return len(self.text)

    def _read(
        self,
        before: Tensor,
        text: Tensor,
        passed: int | None = None,
        passing: Tensor | None = None,
        *,
        alone: bool = False,
    ) -> Sequence[LayerAttention]:
        after = torch.cat([text, self._after])
        return attention_of(
            self._language, before, self.seen.projected, after, passed, passing, alone=alone
        )
