# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision: base crop and picture of an image, all frames of a video.

A large picture of tiles reaches the language model scaled down. What is selected from are the
tokens it would see, so features, saliency and keys are scaled in the same way; a merging selector
thus projects what was scaled where vLLM scales what was projected. What is pruned loses its
newlines, those of rows and the one behind a video: they mark ends of what is no longer whole.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
)
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.utils.torch_utils import async_tensor_h2d

from flashvlm_vllm.budget import TokenCount
from flashvlm_vllm.explained import WHOLE, Placed
from flashvlm_vllm.models.anyres import spread_budget
from flashvlm_vllm.models.kept import Kept
from flashvlm_vllm.models.llava import LlavaSelection
from flashvlm_vllm.models.llava_next import AnyresCounts
from flashvlm_vllm.models.memory import ImageFeatures
from flashvlm_vllm.models.pruning import Candidates, Wanted
from flashvlm_vllm.processing import VisualTokenProcessor

_REMEMBERED_SIZES = 128
"""Layouts of images by their size; one is 60 kB at most."""


class PrunedLlavaOnevisionProcessor(
    AnyresCounts, VisualTokenProcessor, LlavaOnevisionMultiModalProcessor
):
    """LLaVA-OneVision's processor; a video has as many tokens as frames times those of one."""

    def count_video_tokens(
        self, frames: int, width: int, height: int, metadata: Mapping[str, Any] | None
    ) -> TokenCount:
        """Count a video's tokens; the newline behind it is not among those to choose from."""
        total = self.info.get_num_video_tokens(
            image_width=width, image_height=height, num_frames=frames
        )
        return TokenCount(total, total - 1, frames)

    def places_of_parts(self, modality: str, width: int, height: int) -> dict[int, Placed]:
        """Tell where frames, base crop and picture lie: all are the whole."""
        return {0: Placed(WHOLE), 1: Placed(WHOLE)}


@dataclass(frozen=True)
class _Part:
    """Base crop or picture of one image with what is selected from it."""

    image: int
    first: int
    """Position of its first token in the image."""
    candidates: Candidates


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaOnevisionProcessor,
    info=LlavaOnevisionProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class PrunedLlavaOnevision(LlavaSelection, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision that keeps the tokens its requests' questions select."""

    def read_pixels(
        self, modality: str, kwargs: dict[str, Any]
    ) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """Return the pixels of each item's crops or frames, and the images' sizes."""
        if modality == "image":
            return super().read_pixels(modality, kwargs)
        videos: Any = self._parse_and_validate_video_input(**kwargs)
        return list(videos["pixel_values_videos"]), []

    def encode(
        self, pixels: Sequence[Tensor], modality: str, *, with_keys: bool
    ) -> list[ImageFeatures]:
        """Run tower and projector; of videos everything is pooled as their projections are."""
        encoded = super().encode(pixels, modality, with_keys=with_keys)
        if modality == "image":
            return encoded
        return [_each(self.apply_pooling, video) for video in encoded]

    def embed_batch(
        self,
        images: Sequence[ImageFeatures],
        sizes: Sequence[tuple[int, int]],
        wanted: Wanted,
        text: Sequence[Tensor | None],
    ) -> list[Kept]:
        """Select of a few images, or videos, together.

        Spots in an image are those of the base crop, then those of the picture row by row.
        """
        if wanted.modality == "video":
            newline = self.image_newline[None]
            return [
                replace(each, rows=torch.cat([each.rows, newline]))
                if stay > video.saliency.numel()
                else each
                for each, stay, video in zip(
                    self.embed_clips(images, wanted, text), wanted.kept, images, strict=True
                )
            ]

        parts: list[_Part] = []
        for number, (image, size) in enumerate(zip(images, sizes, strict=True)):
            layout = self._laid_out(image, size)
            counts = [each.saliency.numel() for each in layout]
            shares = spread_budget(min(wanted.kept[number], sum(counts)), counts)
            first = 0
            for part, (crop, share, count) in enumerate(zip(layout, shares, counts, strict=True)):
                if share:
                    candidates = Candidates(
                        wanted.selectors[number],
                        wanted.identities[number],
                        share,
                        crop.projected[0],
                        crop.features[0],
                        crop.saliency[0],
                        text[number],
                        None if crop.keys is None else crop.keys[0],
                        self._places(part, size, count, crop.saliency.device),
                        part=part,
                    )
                    parts.append(_Part(number, first, candidates))
                first += count
        chosen = self.select([part.candidates for part in parts])

        kept = []
        for number, (image, size) in enumerate(zip(images, sizes, strict=True)):
            mine = [each for each in zip(parts, chosen, strict=True) if each[0].image == number]
            rows = torch.cat([self.embed(part.candidates, selected) for part, selected in mine])
            if wanted.kept[number] > len(rows):
                # Kept whole beside a larger image of the same request: with its newlines.
                rows = self._merge_image_patch_embeddings(
                    torch.tensor(size),
                    image.projected,
                    image_newline=self.image_newline,
                    strategy="spatial_unpad",
                )
            spots = torch.cat([part.first + selected.spots for part, selected in mine])
            is_merged = any(selected.indices is None for _, selected in mine)
            kept.append(Kept(rows, spots, is_merged))
        return kept

    def places_in_prompt(
        self, spots: Tensor, size: tuple[int, int] | None, modality: str
    ) -> Tensor:
        """Count the newlines before each: one behind every row of the picture."""
        if modality == "video":
            return spots
        assert size is not None
        return async_tensor_h2d(self._places_of(size), spots.device)[spots]

    @cached_property
    def _places_of(self) -> Callable[[tuple[int, int]], Tensor]:
        # Sizes come again.
        return lru_cache(maxsize=_REMEMBERED_SIZES)(self._places_between_newlines)

    def _places_between_newlines(self, size: tuple[int, int]) -> Tensor:
        """Return where every visual token of an image stands, ``(N,)`` on the host."""
        return (self._laid_out_blank(size)[:, 0] == 0).nonzero().flatten()

    def _laid_out_blank(self, size: tuple[int, int]) -> Tensor:
        """Lay out an image of zeros with newlines of one, ``(n, 1)``, as vLLM lays out any."""
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        high, wide = get_anyres_image_grid_shape(
            size, self.config.image_grid_pinpoints, vision.image_size
        )
        laid_out: Tensor = self._merge_image_patch_embeddings(
            torch.tensor(size),
            torch.zeros(1 + high * wide, side * side, 1),
            image_newline=torch.ones(1),
            strategy="spatial_unpad",
        )
        return laid_out

    def _laid_out(self, image: ImageFeatures, size: tuple[int, int]) -> list[ImageFeatures]:
        """Return base crop and picture, ``(1, N, ...)`` each, as vLLM lays out the projections."""
        base = self.salient_tower.tokens
        if len(image.saliency) == 1:
            return [image]

        def lay_out(values: Tensor) -> Tensor:
            laid_out: Tensor = self._merge_image_patch_embeddings(
                torch.tensor(size), values, strategy="spatial_unpad"
            )
            return laid_out[None]

        whole = _each(lay_out, image)
        return [
            _each(lambda values: values[:, :base], whole),
            _each(lambda values: values[:, base:], whole),
        ]

    def _places(self, part: int, size: tuple[int, int], count: int, device: torch.device) -> Tensor:
        """Return rows and columns, ``(count, 2)``: of the base's grid or of the picture's."""
        numbers = torch.arange(count, device=device)
        if part == 0:
            return self.places_of(numbers)
        # Rows are what newlines would be added to, and one is added to each.
        columns = count // int(self._laid_out_blank(size).sum())
        return torch.stack([numbers // columns, numbers % columns], dim=1)


def _each(change: Callable[[Tensor], Tensor], image: ImageFeatures) -> ImageFeatures:
    """Change all of an image's tensors alike, as ``(K, N, channels)``."""
    keys = image.keys
    return replace(
        image,
        features=change(image.features),
        projected=change(image.projected),
        saliency=change(image.saliency[..., None])[..., 0],
        keys=None if keys is None else change(keys.flatten(2)).unflatten(-1, keys.shape[2:]),
    )
