# SPDX-License-Identifier: Apache-2.0
"""Models with a Pixtral tower: images of any size, with a text token at the end of each row.

Every row of an image ends with ``[IMG_BREAK]``, the last with ``[IMG_END]``. All of them are kept,
even for rows without kept tokens, so that rows remain separated. They are text and do not count
towards the budget.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from flashvlm_vllm.models.layouts.text_between import TextBetweenModel, TextBetweenProcessor
from flashvlm_vllm.processing.family import NO_ARGUMENTS
from flashvlm_vllm.request.budget import TokenCount
from flashvlm_vllm.request.refusal import Reason, Refusal
from flashvlm_vllm.selection import Selector
from flashvlm_vllm.vision.packed_tower import PixtralTower
from flashvlm_vllm.worker.candidates import Item, Part
from flashvlm_vllm.worker.feature_cache import ImageFeatures


class RowProcessor(TextBetweenProcessor):
    """Mixin for a processor that marks the ends of rows."""

    text_between = "image"

    @abstractmethod
    def grid(self, width: int, height: int, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Return the number of token columns and rows of an image.

        Args:
            width: in pixels.
            height: in pixels.
            arguments: the request's Hugging Face processor arguments.

        """

    @property
    def visual_token(self) -> int:
        """The token id of a visual token."""
        token: int = self.info.get_hf_config().image_token_index
        return token

    def count_image_tokens(
        self, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> TokenCount:
        """Count an image's tokens, without those at the ends of rows.

        Raises:
            Refusal: the image is so narrow that it would be less than a pixel wide when scaled down
                to the model's size.

        """
        columns, rows = self.grid(width, height, arguments)
        if not columns * rows:
            raise Refusal(
                Reason.NO_TOKENS,
                f"an image of {width} x {height} pixels is too narrow: scaled down to what the "
                "model takes, it is less than a pixel wide",
            )
        return TokenCount(columns * rows, columns * rows)

    def whole_placeholder(self, items: Any, number: int, arguments: Mapping[str, Any]) -> list[int]:
        """Return an unpruned image's placeholder, with one visual token per row."""
        size = items.get_image_size(number)
        _, rows = self.grid(size.width, size.height, arguments)
        processor = self.info.get_hf_processor()
        placeholder = [self.visual_token, processor.image_break_token_id] * rows
        return [*placeholder[:-1], processor.image_end_token_id]


class RowModel(TextBetweenModel):
    """Mixin of a vLLM model with a Pixtral tower."""

    config: Any
    vision_tower: Any
    _parse_and_validate_image_input: Any

    uses: ClassVar[tuple[str, ...]] = ("embed_multimodal", "_parse_and_validate_image_input")

    @property
    def merge(self) -> int:
        """Patches along one side of a token."""
        return getattr(self.config, "spatial_merge_size", 1)

    @abstractmethod
    def project(self, patches: Tensor, sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Project the patches ``(N, C)`` of images with these heights and widths in pixels.

        Returns:
            Features that merging selectors average, and projected tokens, in raster order.

        """

    @cached_property
    def pixtral_tower(self) -> PixtralTower:
        """The vision tower; an error if the model is loaded without it."""
        return PixtralTower(
            self.vision_tower.transformer.layers[-1].attention.attn,
            self.config.vision_config.num_attention_heads,
        )

    def read_items(self, modality: str, kwargs: dict[str, Any]) -> list[Item]:
        """Read images, ``(3, H, W)`` each."""
        # Removed before vLLM's parser, which does not know the field.
        packed = self.pop_texts(kwargs, 0)
        parsed: Any = self._parse_and_validate_image_input(**kwargs)
        pixels = list(parsed["pixel_values"])
        grids = [self.token_grid(image) for image in pixels]
        assert packed is not None, "every pruned image has text between its rows"
        return [
            Item(image, rows * columns, modality, replace(layout, group=columns))
            for image, (rows, columns), layout in zip(pixels, grids, packed, strict=True)
        ]

    def encode(self, items: Sequence[Item], *, with_keys: bool) -> list[ImageFeatures]:
        """Run tower and projector; saliency and keys of a token are the mean over its patches."""
        pixels = [each.pixels for each in items]
        merge = self.merge
        grids = [self.token_grid(image) for image in pixels]
        totals = [rows * columns for rows, columns in grids]
        encoded = self.pixtral_tower.run(
            lambda: self.vision_tower(pixels),
            [total * merge**2 for total in totals],
            with_keys=with_keys,
        )
        sizes = [(image.shape[-2], image.shape[-1]) for image in pixels]
        features, projected = self.project(torch.cat(encoded.result), sizes)

        def pooled(patches: Tensor, grid: tuple[int, int]) -> Tensor:
            rows, columns = grid
            picture = patches.flatten(1).T.view(1, -1, rows * merge, columns * merge)
            return avg_pool2d(picture, merge).flatten(2).transpose(1, 2)

        return [
            ImageFeatures(
                own[None],
                mapped[None],
                pooled(saliency[:, None], grid)[..., 0],
                None if keys is None else pooled(keys, grid).unflatten(2, keys.shape[1:]),
            )
            for own, mapped, saliency, keys, grid in zip(
                features.split(totals),
                projected.split(totals),
                encoded.saliency,
                encoded.keys,
                grids,
                strict=True,
            )
        ]

    def parts(self, item: Item, features: ImageFeatures, selector: Selector) -> list[Part]:
        """Return the image as one part."""
        return [Part.of_clip(features, item.layout.group)]

    def token_grid(self, pixels: Tensor) -> tuple[int, int]:
        """Return rows and columns of an image's tokens."""
        step = self.config.vision_config.patch_size * self.merge
        return pixels.shape[-2] // step, pixels.shape[-1] // step
