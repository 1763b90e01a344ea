# SPDX-License-Identifier: Apache-2.0
"""An item in the worker: as read, its parts, and what one selection chooses from."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashvlm_vllm.selection import Selector, VisualTokens
from flashvlm_vllm.selection.registry import find_selector
from flashvlm_vllm.worker.feature_cache import ImageFeatures


@dataclass(frozen=True)
class Item:
    """One image or video of a request that is pruned, as read from the model inputs."""

    pixels: Tensor
    """As the family's `encode` takes them."""
    tokens: int
    """Visual tokens without pruning, those that the encoder makes."""
    modality: str
    layout: Any = None
    """What the family needs to lay the item out, such as its size or its grid."""


@dataclass(frozen=True)
class Part:
    """Tokens that one selection chooses from: an image, one of its crops, or a whole clip."""

    projected: Tensor
    """``(N, D)``."""
    features: Tensor
    """``(N, C)`` before the projector."""
    saliency: Tensor
    """``(N,)``."""
    keys: Tensor | None
    """``(N, H, d)``; ``None`` unless a selector of the batch uses them."""
    places: Tensor
    """``(N, 2)`` rows and columns."""
    spots: Tensor | int = 0
    """``(N,)`` int64: which of the item's visual tokens each is; or the first of consecutive
    ones."""
    number: int = 0
    """Among the item's parts; see `VisualTokenProcessor.part_regions`."""
    frames: int = 1
    """Time steps of a video, of equally many tokens each, one after another."""
    embeddings: Tensor | None = None
    """``(N, E)`` rows for the language model, where those are wider than ``projected``."""

    @classmethod
    def of_clip(cls, item: ImageFeatures, columns: int) -> "Part":
        """Return the one part of a video, or of an image of one crop.

        Args:
            item: one crop per time step.
            columns: of tokens in a time step.

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
        """Return which of the item's visual tokens some of the part's are, ``(T,)``.

        Args:
            chosen: ``(T,)`` positions in the part.

        """
        return self.spots[chosen] if isinstance(self.spots, Tensor) else self.spots + chosen


@dataclass(frozen=True)
class Candidates:
    """A part, with what is asked of it."""

    part: Part
    selector: str
    selection_key: bytes
    """Equal for what must get the same answer: the item, its budget, selector and question."""
    budget: int
    """Tokens to keep of the part. A video's is no smaller than its number of time steps."""
    text: Tensor | None
    """``(L, D)`` embeddings of the question; ``None`` without one."""

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
        """Names of the fields of a ``Selection`` that are set, even if the selector fails."""
        if self.budget >= self.total or not find_selector(self.selector).merges:
            return ("indices",)
        return ("merged", "anchors")

    @property
    def key(self) -> tuple[bytes, int]:
        """Key of the selection in the selection cache."""
        return self.selection_key, self.part.number

    def tokens(self, selector: Selector) -> VisualTokens:
        """Return the selector's input."""
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
            times=self._times(),
        )

    def _times(self) -> Tensor | None:
        if self.part.frames == 1:
            return None
        numbers = torch.arange(self.total, device=self.part.projected.device)
        return numbers // (self.total // self.part.frames)
