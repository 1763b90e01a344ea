# SPDX-License-Identifier: Apache-2.0
"""Models whose images are some tiles, and whose videos some frames, of equally many tokens each.

An image's tiles share its budget equally, as far as it divides; of a video the tokens are chosen
over the whole clip.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig

from flashvlm_vllm.models.anyres import spread_budget
from flashvlm_vllm.models.kept import Kept
from flashvlm_vllm.models.memory import ImageFeatures
from flashvlm_vllm.models.pruning import Candidates, Wanted
from flashvlm_vllm.models.text_between import TextBetweenSelection, take_text_between
from flashvlm_vllm.selection import Selection


@dataclass(frozen=True)
class _Part:
    """One tile of an image, or all frames of a video, with what is selected from it."""

    item: int
    start: int
    """Position of the first token within the item."""
    candidates: Candidates


class TileSelection(TextBetweenSelection):
    """Mixin of a vLLM model of tiles or frames."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.set_up_selection(vllm_config)

    @property
    def tile_tokens(self) -> int:
        """How many tokens a tile has."""
        raise NotImplementedError

    @property
    def tile_places(self) -> Tensor:
        """Rows and columns, ``(n, 2)``, of a tile's tokens."""
        raise NotImplementedError

    def read_tiles(self, kwargs: dict[str, Any], *, is_video: bool) -> tuple[Tensor, list[int]]:
        """Return all tiles or frames, ``(B, 3, H, W)``, and how many each item has."""
        raise NotImplementedError

    def encode_tiles(self, pixels: Tensor, *, with_keys: bool) -> ImageFeatures:
        """Run tower and projector on tiles or frames, ``(B, 3, H, W)``; the result is per tile."""
        raise NotImplementedError

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode images or videos; those with a budget come back as their kept tokens only."""
        texts = take_text_between(kwargs)
        wanted = Wanted.take_from(kwargs)
        if wanted is None:
            return super().embed_multimodal(**kwargs)
        is_video = texts is not None
        flat, tiles = self.read_tiles(kwargs, is_video=is_video)
        pixels = flat.split(tiles)
        text = self.embed_queries(wanted.queries)
        totals = [self.tile_tokens * count for count in tiles]
        kept: list[Kept] = []
        for batch in self.encoder_batches(totals):
            items = self.features_of(pixels[batch], wanted[batch])
            kept += self._embed_batch(items, wanted[batch], text[batch], is_video=is_video)
        self.trace(totals, [each.order for each in kept], wanted.queries)
        if texts is not None:
            return self.with_text(texts, totals, kept, wanted.gaps, self.tile_tokens)
        return [self.in_prompt(each, gap) for each, gap in zip(kept, wanted.gaps, strict=True)]

    def features_of(self, pixels: Sequence[Tensor], wanted: Wanted) -> list[ImageFeatures]:
        """Run tower and projector on those items whose features are not in the cache.

        Args:
            pixels: ``(K, 3, H, W)`` of each item.
            wanted: what their requests ask for.

        """
        with_keys = wanted.use_keys

        def encode(missing: list[int]) -> list[ImageFeatures]:
            tiles = [len(pixels[number]) for number in missing]
            together = torch.cat([pixels[number] for number in missing])
            return self.encode_tiles(together, with_keys=with_keys).split(tiles)

        return self.feature_cache.features_of(wanted.images, encode, with_keys=with_keys)

    def _embed_batch(
        self,
        items: Sequence[ImageFeatures],
        wanted: Wanted,
        text: Sequence[Tensor | None],
        *,
        is_video: bool,
    ) -> list[Kept]:
        """Select of a few images or videos together."""
        parts: list[_Part] = []
        for number, item in enumerate(items):
            parts += self._parts_of(number, item, wanted, text[number], is_video=is_video)
        chosen = self.select([part.candidates for part in parts])
        together = list(zip(parts, chosen, strict=True))
        return [
            self._put_together([pair for pair in together if pair[0].item == number])
            for number in range(len(items))
        ]

    def _parts_of(
        self,
        number: int,
        item: ImageFeatures,
        wanted: Wanted,
        text: Tensor | None,
        *,
        is_video: bool,
    ) -> Iterator[_Part]:
        tiles, count = item.saliency.shape
        budget = min(wanted.kept[number], tiles * count)
        # Each tile is a picture of its own; a clip's frames show the same things again.
        groups = [(0, tiles)] if is_video else [(tile, tile + 1) for tile in range(tiles)]
        shares = spread_budget(budget, [(end - start) * count for start, end in groups])
        for part, ((start, end), share) in enumerate(zip(groups, shares, strict=True)):
            if share:
                yield _Part(
                    number,
                    start * count,
                    Candidates(
                        wanted.selectors[number],
                        wanted.identities[number],
                        share,
                        item.projected[start:end].flatten(0, 1),
                        item.features[start:end].flatten(0, 1),
                        item.saliency[start:end].flatten(),
                        text,
                        None if item.keys is None else item.keys[start:end].flatten(0, 1),
                        self.tile_places.repeat(end - start, 1),
                        part=part,
                        frames=end - start,
                    ),
                )

    def _put_together(self, parts: Sequence[tuple[_Part, Selection]]) -> Kept:
        rows = torch.cat([self.embed(part.candidates, selection) for part, selection in parts])
        spots = torch.cat([part.start + selection.spots for part, selection in parts])
        is_merged = any(selection.indices is None for _, selection in parts)
        return Kept(rows, spots, is_merged)
