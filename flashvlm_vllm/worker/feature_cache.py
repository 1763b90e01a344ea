# SPDX-License-Identifier: Apache-2.0
"""The worker's caches: visual features of images and videos, and selections."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashvlm_vllm.ipc.worker_calls import CacheStatistics
from flashvlm_vllm.lru import RecentlyUsed
from flashvlm_vllm.selection import Selection

_SELECTION_BYTES = 64 * 2**20
_OVERHEAD_BYTES = 512
"""Approximate size of a selection without its tensors. 64 indices take another 512 bytes, 64 merged
tokens of a 7B model's tower 128 KiB: the cache holds thousands of selections of indices, or
hundreds of merged ones."""


def selection_cache() -> RecentlyUsed[Selection]:
    """Return an empty cache of selections, keyed by `Candidates.key`."""
    return RecentlyUsed(_SELECTION_BYTES, _selection_bytes)


def _selection_bytes(selection: Selection) -> int:
    every = (selection.indices, selection.merged, selection.anchors)
    return sum(each.nbytes for each in every if each is not None) + _OVERHEAD_BYTES


@dataclass(frozen=True)
class ImageFeatures:
    """Output of tower and projector for one image of ``K`` crops, independent of the question."""

    features: Tensor
    """``(K, N, C)`` before the projector."""
    projected: Tensor
    """``(K, N, D)`` after the projector."""
    saliency: Tensor
    """``(K, N)`` float32, attention received."""
    keys: Tensor | None
    """``(K, N, H, d)`` attention keys; ``None`` unless a selector uses them."""
    error: str | None = None
    """Why the model did not give usable features; these are zeros, and the request fails."""

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that are set."""
        every = (self.features, self.projected, self.saliency, self.keys)
        return [each for each in every if each is not None]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(each.nbytes for each in self.tensors)

    def split(self, crops: Sequence[int]) -> "list[ImageFeatures]":
        """Split a batch of crops into images, given the number of crops of each."""
        keys = [None] * len(crops) if self.keys is None else self.keys.split(list(crops))
        parts = (each.split(list(crops)) for each in (self.features, self.projected, self.saliency))
        return [ImageFeatures(*each) for each in zip(*parts, keys, strict=True)]

    def detached(self) -> "ImageFeatures":
        """Return a copy. A view of a batch would keep the memory of the whole batch allocated."""
        keys = None if self.keys is None else self.keys.clone()
        return ImageFeatures(
            self.features.clone(), self.projected.clone(), self.saliency.clone(), keys
        )


class FeatureCache:
    """LRU cache of features, so that another question about an image does not run the tower again.

    Keys depend on the image alone. Hits and evictions depend only on the calls and the sizes, which
    are the same on every rank: with tensor parallelism all ranks must run the tower together.
    """

    def __init__(self, limit_bytes: int, device: torch.device) -> None:
        """Store at most ``limit_bytes`` on ``device``; 0 turns the cache off."""
        self._held: RecentlyUsed[ImageFeatures] = RecentlyUsed(
            limit_bytes, lambda features: features.nbytes
        )
        # vLLM profiles a GPU's memory before the first image arrives and gives the free memory to
        # the KV cache. So the memory is reserved at start and released at the first image.
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
        """Return the features of each image; encode those that are not cached.

        Args:
            images: keys, equal for equal images; equal images are encoded once.
            encode: runs the tower on the images with these numbers.
            with_keys: whether attention keys are needed.

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
        """Remove all features, for example after new weights were loaded."""
        self._held.clear()

    def read(self) -> CacheStatistics:
        """Return hits and misses since the start, and the bytes stored."""
        return CacheStatistics(self._hits, self._misses, self._held.held_bytes)
