# SPDX-License-Identifier: Apache-2.0
"""Models with a CLIP or SigLIP tower: items are crops or frames with a square grid each."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashvlm_vllm.selection import Selector
from flashvlm_vllm.vision.clip_siglip import Encoded, SalientTower
from flashvlm_vllm.worker.candidates import Item, Part
from flashvlm_vllm.worker.feature_cache import ImageFeatures
from flashvlm_vllm.worker.pruned_model import PrunedModel


class CropModel(PrunedModel):
    """Mixin of a model whose items are crops or frames, ``(K, 3, H, W)``.

    An item's layout is the image's height and width in pixels, if the model needs them.
    """

    config: Any
    vision_tower: Any
    _image_pixels_to_features: Any
    _parse_and_validate_image_input: Any

    uses: ClassVar[tuple[str, ...]] = (
        "embed_multimodal",
        "_image_pixels_to_features",
        "_parse_and_validate_image_input",
    )

    def read_items(self, modality: str, kwargs: dict[str, Any]) -> list[Item]:
        """Read images; a family with videos overrides this."""
        image_input = self._parse_and_validate_image_input(**kwargs)
        given = image_input.get("image_sizes")
        sizes = None if given is None else [(int(high), int(wide)) for high, wide in given]
        crops = [each if each.dim() == 4 else each[None] for each in image_input["pixel_values"]]
        return self.items_of(crops, modality, sizes)

    def items_of(
        self, pixels: Sequence[Tensor], modality: str, sizes: Sequence[Any] | None = None
    ) -> list[Item]:
        """Create items.

        Args:
            pixels: ``(K, 3, H, W)`` of each item.
            modality: modality of all items.
            sizes: heights and widths in pixels, if the model needs them.

        """
        tokens = self.salient_tower.tokens
        return [
            Item(own, tokens * len(own), modality, size)
            for own, size in zip(pixels, sizes or [None] * len(pixels), strict=True)
        ]

    @cached_property
    def salient_tower(self) -> SalientTower:
        """The vision tower; an error if the model is loaded without it."""
        return SalientTower(self.vision_tower, self.config)

    def grid_places(self, patches: Tensor) -> Tensor:
        """Return rows and columns ``(n, 2)`` of patches, given their numbers in a crop."""
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        return torch.stack([patches // side, patches % side], dim=1)

    def encode(self, items: Sequence[Item], *, with_keys: bool) -> list[ImageFeatures]:
        """Run tower and projector on all crops together."""
        encoded = self.encode_crops(torch.cat([each.pixels for each in items]), with_keys=with_keys)
        projected = self.multi_modal_projector(encoded.features)
        batch = ImageFeatures(encoded.features, projected, encoded.saliency, encoded.keys)
        return batch.split([len(each.pixels) for each in items])

    def encode_crops(self, pixels: Tensor, *, with_keys: bool) -> Encoded:
        """Run the tower on crops or frames ``(B, 3, H, W)``, up to the projector."""
        return self.salient_tower.run(
            lambda crops: self._image_pixels_to_features(self.vision_tower, crops),
            pixels,
            with_keys=with_keys,
        )

    def parts(self, item: Item, features: ImageFeatures, selector: Selector) -> list[Part]:
        """Return an image with one crop, or all frames of a video, as one part."""
        return [Part.of_clip(features, math.isqrt(features.saliency.shape[1]))]
