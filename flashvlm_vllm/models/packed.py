# SPDX-License-Identifier: Apache-2.0
"""What models with a Pixtral tower share: images of any size, and text at the ends of rows.

Every picture row ends with ``[IMG_BREAK]``, the last with ``[IMG_END]``. All of them stay, those
of rows without any kept token too, so that what is left tells where it was. They are text and not
part of the budget.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from vllm.config import VllmConfig

from flashvlm_vllm.budget import TokenCount
from flashvlm_vllm.models.kept import Kept
from flashvlm_vllm.models.memory import ImageFeatures
from flashvlm_vllm.models.pruning import Candidates, Wanted
from flashvlm_vllm.models.text_between import (
    TextBetweenProcessor,
    TextBetweenSelection,
    take_text_between,
)
from flashvlm_vllm.refusal import Reason, Refusal
from flashvlm_vllm.vision.pixtral import PixtralTower


class RowsProcessor(TextBetweenProcessor):
    """Mixin for a processor that marks the ends of rows."""

    text_between = "image"

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return columns and rows of the tokens of an image."""
        raise NotImplementedError

    @property
    def visual_token(self) -> int:
        """The id that stands for a visual token."""
        token: int = self.info.get_hf_config().image_token_index
        return token

    def count_image_tokens(self, width: int, height: int) -> TokenCount:
        """Count an image's tokens, without those at the ends of rows.

        Raises:
            Refusal: the image is so narrow that nothing of it is left when it is scaled
                down to the model's size.

        """
        columns, rows = self.grid(width, height)
        if not columns * rows:
            raise Refusal(
                Reason.NO_TOKENS,
                f"an image of {width} x {height} pixels is too narrow: scaled down to what the "
                "model takes, it is less than a pixel wide",
            )
        return TokenCount(columns * rows, columns * rows)

    def whole_placeholder(self, items: Any, number: int) -> list[int]:
        """Return the placeholder of an image that is not pruned, with one token to a row."""
        _, rows = self.grid(*items.get_image_size(number))
        processor = self.info.get_hf_processor()
        placeholder = [self.visual_token, processor.image_break_token_id] * rows
        return [*placeholder[:-1], processor.image_end_token_id]


class PackedSelection(TextBetweenSelection):
    """Mixin of a vLLM model with a Pixtral tower."""

    config: Any
    vision_tower: Any
    _parse_and_validate_image_input: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.set_up_selection(vllm_config)

    @property
    def merge(self) -> int:
        """Patches along one side of a token."""
        return getattr(self.config, "spatial_merge_size", 1)

    def project(self, patches: Tensor, sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Make tokens of the patches, ``(N, C)``, of images of so many pixels.

        Returns:
            features that merging selectors average, and tokens, row by row.

        """
        raise NotImplementedError

    @cached_property
    def pixtral_tower(self) -> PixtralTower:
        """The tower, which a model loaded without its vision part does not have."""
        return PixtralTower(
            self.vision_tower.transformer.layers[-1].attention.attn,
            self.config.vision_config.num_attention_heads,
        )

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode images; those with a budget come back as kept tokens and the ends of rows."""
        texts = take_text_between(kwargs)
        wanted = Wanted.take_from(kwargs)
        if wanted is None or texts is None:
            return super().embed_multimodal(**kwargs)
        parsed: Any = self._parse_and_validate_image_input(**kwargs)
        pixels = list(parsed["pixel_values"])
        text = self.embed_queries(wanted.queries)
        grids = [self._grid(image) for image in pixels]
        totals = [rows * columns for rows, columns in grids]
        kept: list[Kept] = []
        for batch in self.encoder_batches(totals):
            images = self.features_of(pixels[batch], wanted[batch])
            candidates = [
                self._candidates(*each)
                for each in zip(
                    images,
                    grids[batch],
                    text[batch],
                    wanted[batch].selectors,
                    wanted[batch].identities,
                    wanted[batch].kept,
                    strict=True,
                )
            ]
            kept += self.select_and_embed(candidates)
        self.trace(totals, [each.order for each in kept], wanted.queries)
        columns = [columns for _, columns in grids]
        return self.with_text(texts, totals, kept, wanted.gaps, columns)

    def features_of(self, pixels: Sequence[Tensor], wanted: Wanted) -> list[ImageFeatures]:
        """Run tower and projector on those images whose features are not in the cache.

        Args:
            pixels: ``(3, H, W)`` of each image.
            wanted: what their requests ask for.

        """
        with_keys = wanted.use_keys

        def encode(missing: list[int]) -> list[ImageFeatures]:
            return self._encode([pixels[number] for number in missing], with_keys=with_keys)

        return self.feature_cache.features_of(wanted.images, encode, with_keys=with_keys)

    def _encode(self, pixels: list[Tensor], *, with_keys: bool) -> list[ImageFeatures]:
        """Encode; a token's saliency and keys are the mean of its patches'."""
        merge = self.merge
        grids = [self._grid(image) for image in pixels]
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

    def _grid(self, pixels: Tensor) -> tuple[int, int]:
        """Return rows and columns of an image's tokens."""
        step = self.config.vision_config.patch_size * self.merge
        return pixels.shape[-2] // step, pixels.shape[-1] // step

    @staticmethod
    def _candidates(
        image: ImageFeatures,
        grid: tuple[int, int],
        text: Tensor | None,
        selector: str,
        identity: bytes,
        budget: int,
    ) -> Candidates:
        _, columns = grid
        numbers = torch.arange(image.saliency.shape[1], device=image.saliency.device)
        return Candidates(
            selector,
            identity,
            budget,
            image.projected[0],
            image.features[0],
            image.saliency[0],
            text,
            None if image.keys is None else image.keys[0],
            torch.stack([numbers // columns, numbers % columns], dim=1),
        )
