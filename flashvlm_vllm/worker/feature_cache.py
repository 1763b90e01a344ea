# SPDX-License-Identifier: Apache-2.0
"""What the worker remembers: the features of images, and what it chose of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashvlm_vllm.ipc.worker_calls import CacheStatistics
from flashvlm_vllm.lru import RecentlyUsed
from flashvlm_vllm.selection import Selection

_SELECTION_BYTES = 64 * 2**20
_OVERHEAD_BYTES = 512
"""What a selection costs beside its tensor, about. 64 indices are as much again, 64 merged tokens
of a 7B model's tower 128 KiB: thousands of choices fit, or hundreds of merges."""


def selection_cache() -> RecentlyUsed[Selection]:
    """Return an empty memory of selections, by what they are for."""
    return RecentlyUsed(_SELECTION_BYTES, _selection_bytes)


def _selection_bytes(selection: Selection) -> int:
    every = (selection.indices, selection.merged, selection.anchors)
    return sum(each.nbytes for each in every if each is not None) + _OVERHEAD_BYTES


@dataclass(frozen=True)
class ImageFeatures:
    """What tower and projector make of one image of ``K`` crops, whatever is asked about it."""

    features: Tensor
    """``(K, N, C)`` before the projector."""
    projected: Tensor
    """``(K, N, D)``."""
    saliency: Tensor
    """``(K, N)`` float32."""
    keys: Tensor | None
    """``(K, N, H, d)``; ``None`` unless a selector asked for them."""

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        every = (self.features, self.projected, self.saliency, self.keys)
        return [each for each in every if each is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.nbytes for each in self.tensors)

    def split(self, crops: Sequence[int]) -> "list[ImageFeatures]":
        """Cut a batch of crops into images of so many crops each."""
        keys = [None] * len(crops) if self.keys is None else self.keys.split(list(crops))
        parts = (each.split(list(crops)) for each in (self.features, self.projected, self.saliency))
        return [ImageFeatures(*each) for each in zip(*parts, keys, strict=True)]

    def detached(self) -> "ImageFeatures":
        """Return a copy that keeps nothing else alive: a row of a batch holds the whole batch."""
        keys = None if self.keys is None else self.keys.clone()
        return ImageFeatures(
            self.features.clone(), self.projected.clone(), self.saliency.clone(), keys
        )


class FeatureCache:
    """Features of the images seen last, so that another question does not pay for the tower.

    Keyed by the image alone. Hits and evictions follow from the calls and the sizes only, which
    are the same on every rank: the tower is a collective there.
    """

    def __init__(self, limit_bytes: int, device: torch.device) -> None:
        """Hold at most ``limit_bytes`` on ``device``; 0 turns the cache off."""
        self._held: RecentlyUsed[ImageFeatures] = RecentlyUsed(
            limit_bytes, lambda features: features.nbytes
        )
        # A GPU's memory is measured before the first image comes, and what is free then goes to
        # the KV cache. So the room is taken from the start, and handed over to the first image.
        self._reserved = (
            torch.empty(limit_bytes, dtype=torch.uint8, device=device)
            if device.type == "cuda"
            else None
        )
        self._hits = 0
        self._misses = 0

    def features_of(
        self,
        images: Sequence[bytes],
        encode: Callable[[list[int]], list[ImageFeatures]],
        *,
        with_keys: bool,
    ) -> list[ImageFeatures]:
        """Return the features of each image, encoding those that are not at hand.

        Args:
            images: equal for equal images; each of them is encoded once.
            encode: runs the tower on the images of these numbers.
            with_keys: whether the keys are needed as well.

        """
        known: dict[bytes, ImageFeatures] = {}
        missing: dict[bytes, int] = {}
        for number, image in enumerate(images):
            held = None if image in missing else self._held.get(image)
            if held is not None and (held.keys is not None or not with_keys):
                known[image] = held
            else:
                missing.setdefault(image, number)
        if missing:
            self._reserved = None
            for image, encoded in zip(missing, encode(list(missing.values())), strict=True):
                known[image] = encoded
                if encoded.nbytes <= self._held.limit_bytes:
                    self._held.put(image, encoded.detached())
        self._misses += len(missing)
        self._hits += len(images) - len(missing)
        return [known[image] for image in images]

    def clear(self) -> None:
        """Forget all features, when they are no longer what the model would compute."""
        self._held.clear()

    def read(self) -> CacheStatistics:
        """Return the hits and misses since the start, and the bytes held."""
        return CacheStatistics(self._hits, self._misses, self._held.held_bytes)
