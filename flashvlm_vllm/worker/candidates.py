# SPDX-License-Identifier: Apache-2.0
"""Types of the worker: an item, its parts, and the candidates of one selection."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashvlm_vllm.selection import LanguageAttention, Selector, VisualTokens
from flashvlm_vllm.selection.registry import find_selector
from flashvlm_vllm.worker.feature_cache import ImageFeatures


@dataclass(frozen=True)
class Item:
    """One pruned image or video, as read from the model inputs."""

    pixels: Tensor
    """Input of the family's `encode`."""
    tokens: int
    """Number of visual tokens without pruning, all of which are encoded."""
    modality: str
    layout: Any = None
    """What the family needs to lay out the item's tokens, such as its size or grid."""


@dataclass(frozen=True)
class Part:
    """Tokens that one selection chooses from: an image, one of its crops, or a whole video."""

    projected: Tensor
    """``(N, D)`` after the projector."""
    features: Tensor
    """``(N, C)`` before the projector."""
    saliency: Tensor
    """``(N,)`` attention received."""
    keys: Tensor | None
    """``(N, H, d)`` attention keys; ``None`` unless a selector of the batch uses them."""
    places: Tensor
    """``(N, 2)`` int64 rows and columns."""
    spots: Tensor | int = 0
    """``(N,)`` int64 indices among the item's visual tokens; or the first of consecutive ones."""
    number: int = 0
    """Part number in the item; see `VisualTokenProcessor.part_regions`."""
    frames: int = 1
    """Number of time steps, with equally many tokens each. Tokens are ordered by time step."""
    embeddings: Tensor | None = None
    """``(N, E)`` embeddings for the language model, if they are wider than ``projected``."""

    @classmethod
    def of_clip(cls, item: ImageFeatures, columns: int) -> "Part":
        """Return the single part of a video, or of an image with one crop.

        Args:
            item: features with one crop per time step.
            columns: number of token columns in a time step.

        """
        steps, tokens = item.saliency.shape
        place = torch.arange(tokens, device=item.saliency.device).repeat(steps)
        return cls(
            projected=item.projected.flatten(0, 1),
            features=item.features.flatten(0, 1),
            saliency=item.saliency.flatten(),
            keys=None if item.keys is None else item.keys.flatten(0, 1),
            places=torch.stack([place // columns, place % columns], dim=1),
            frames=steps,
        )

    def spots_of(self, chosen: Tensor) -> Tensor:
        """Return the indices ``(T,)`` among the item's visual tokens of some tokens of this part.

        Args:
            chosen: ``(T,)`` indices in the part.

        """
        return self.spots[chosen] if isinstance(self.spots, Tensor) else self.spots + chosen


@dataclass(frozen=True)
class Candidates:
    """A part and the selection request for it."""

    part: Part
    selector: str
    selection_key: bytes
    """Identity of item, budget, selector and question; equal keys get the same selection."""
    budget: int
    """Number of tokens to keep of the part. For a video at least its number of time steps."""
    text: Tensor | None
    """``(L, D)`` embeddings of the question; ``None`` without a question."""
    attention: LanguageAttention | None = None
    """Attention of the prompt's words to the part; ``None`` unless the selector uses it."""

    @property
    def total(self) -> int:
        """Number of tokens to choose from."""
        return len(self.part.projected)

    @property
    def kept(self) -> int:
        """Number of tokens that the selection returns."""
        return min(self.budget, self.total)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the fields that the ``Selection`` will have, even if the selector fails."""
        if self.budget >= self.total or not find_selector(self.selector).merges:
            return ("indices",)
        return ("merged", "anchors")

    @property
    def key(self) -> tuple[bytes, int]:
        """Key in the selection cache."""
        return self.selection_key, self.part.number

    def tokens(self, selector: Selector) -> VisualTokens:
        """Return the input for the selector."""
        part = self.part
        return VisualTokens(
            budget=self.budget,
            projected=part.projected,
            features=part.features,
            saliency=part.saliency,
            text=self.text if selector.uses_question else None,
            keys=part.keys if selector.uses_keys else None,
            places=part.places,
            seed=int.from_bytes(self.selection_key[:8], "big") >> 1,
            times=self.times,
            attention=self.attention,
        )

    @property
    def times(self) -> Tensor | None:
        """``(N,)`` int64 time step of each token; ``None`` for an image."""
        if self.part.frames == 1:
            return None
        numbers = torch.arange(self.total, device=self.part.projected.device)
        return numbers // (self.total // self.part.frames)
