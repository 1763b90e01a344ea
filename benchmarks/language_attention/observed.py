# SPDX-License-Identifier: Apache-2.0
"""What the words of a prompt attend to in every layer of the small VLM, on Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.accuracy.layer_attention import LayerAttention, attention_of
from benchmarks.accuracy.reference import AFTER, BEFORE, Reference, Seen


@dataclass(frozen=True)
class Observed:
    """One picture and question, as variants of the selector see them."""

    seen: Seen
    text: Tensor
    """(L, D) raw embeddings of the question's words."""
    layers: Sequence[LayerAttention]
    """Rows: the question's words, then those of the template up to the answer."""
    bare: Sequence[LayerAttention]
    """The same without the words before the picture."""
    empty: Sequence[LayerAttention]
    """The same without a question: rows of the template only."""

    @property
    def words(self) -> int:
        """Number of rows of the question's words."""
        return len(self.text)


def observe(reference: Reference, seen: Seen, question: str) -> Observed:
    """Run the language model on a whole picture with a question, with half of one, and without."""
    text = reference.words(question)
    before, after = reference.words(BEFORE), reference.words(AFTER)
    return Observed(
        seen,
        text,
        attention_of(reference.language, before, seen.projected, torch.cat([text, after])),
        attention_of(reference.language, before[:0], seen.projected, torch.cat([text, after])),
        attention_of(reference.language, before, seen.projected, after),
    )
