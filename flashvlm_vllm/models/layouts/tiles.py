# SPDX-License-Identifier: Apache-2.0
"""Models whose images are tiles and whose videos are frames, with equally many tokens each.

The budget of an image is divided equally over its tiles, up to rounding; the tokens of a video are
selected from all frames together.
"""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from flashvlm_vllm.models.layouts.text_between import TextBetweenModel
from flashvlm_vllm.selection import Selector
from flashvlm_vllm.worker.candidates import Item, Part
from flashvlm_vllm.worker.feature_cache import ImageFeatures


class TileModel(TextBetweenModel):
    """Mixin of a vLLM model of tiles or frames."""

    @property
    @abstractmethod
    def tile_tokens(self) -> int:
        """Number of tokens of a tile."""

    @property
    @abstractmethod
    def tile_places(self) -> Tensor:
        """Rows and columns ``(n, 2)`` of a tile's tokens."""

    @abstractmethod
    def read_tiles(self, kwargs: dict[str, Any], *, is_video: bool) -> tuple[Tensor, list[int]]:
        """Return all tiles or frames, ``(B, 3, H, W)``, and the number of them for each item."""

    @abstractmethod
    def encode_tiles(self, pixels: Tensor, *, with_keys: bool) -> ImageFeatures:
        """Run tower and projector on tiles or frames, ``(B, 3, H, W)``; results are per tile."""

    def read_items(self, modality: str, kwargs: dict[str, Any]) -> list[Item]:
        """Read images (tiles) or videos (frames)."""
        texts = self.pop_texts(kwargs, self.tile_tokens) or repeat(None)
        flat, tiles = self.read_tiles(kwargs, is_video=modality == "video")
        return [
            Item(pixels, self.tile_tokens * len(pixels), modality, text)
            for pixels, text in zip(flat.split(tiles), texts, strict=False)
        ]

    def encode(self, items: Sequence[Item], *, with_keys: bool) -> list[ImageFeatures]:
        """Run tower and projector on all tiles together."""
        pixels = torch.cat([each.pixels for each in items])
        encoded = self.encode_tiles(pixels, with_keys=with_keys)
        return encoded.split([len(each.pixels) for each in items])

    def parts(self, item: Item, features: ImageFeatures, selector: Selector) -> list[Part]:
        """Return the tiles of an image as parts, or all frames of a video as one part.

        Tiles show different things, while a video's frames mostly repeat each other.
        """
        tiles, count = features.saliency.shape
        groups = [(0, tiles)] if item.modality == "video" else [(i, i + 1) for i in range(tiles)]
        return [
            Part(
                projected=features.projected[start:end].flatten(0, 1),
                features=features.features[start:end].flatten(0, 1),
                saliency=features.saliency[start:end].flatten(),
                keys=None if features.keys is None else features.keys[start:end].flatten(0, 1),
                places=self.tile_places.repeat(end - start, 1),
                spots=start * count,
                number=number,
                frames=end - start,
            )
            for number, (start, end) in enumerate(groups)
        ]
