# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 and its relatives with a CLIP or SigLIP tower."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PixtralVisionConfig
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    _build_llava_or_pixtral_hf_info,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from flashvlm_vllm.explained import Placed
from flashvlm_vllm.fields import KEPT, field_name
from flashvlm_vllm.models.kept import Kept
from flashvlm_vllm.models.memory import ImageFeatures
from flashvlm_vllm.models.pruning import (
    Candidates,
    VisualTokenSelection,
    Wanted,
    clip_candidates,
)
from flashvlm_vllm.models.regions import cropped
from flashvlm_vllm.processing import VisualTokenProcessor
from flashvlm_vllm.vision.tower import Encoded, SalientTower


class PrunedLlavaProcessor(VisualTokenProcessor, LlavaMultiModalProcessor):
    """LLaVA-1.5's processor: every image has the tower's number of tokens."""

    def places_of_parts(self, modality: str, width: int, height: int) -> dict[int, Placed]:
        """Tell what of the picture is left: CLIP's processors crop."""
        return cropped(self.info.get_hf_processor().image_processor, width, height)


def build_processor(info: Any, dummy_inputs: Any, **kwargs: Any) -> Any:
    """Build the processor of LLaVA, or of Pixtral, which vLLM serves by the same class."""
    if _is_pixtral(info.get_hf_config()):
        from flashvlm_vllm.models.pixtral import PrunedPixtralProcessor

        return PrunedPixtralProcessor(info, dummy_inputs, **kwargs)
    return PrunedLlavaProcessor(info, dummy_inputs, **kwargs)


class LlavaSelection(VisualTokenSelection):
    """What the LLaVA families share: a tower, a projector, and fields per image or video.

    Derive from this first and from vLLM's model second, and embed a batch of items.
    """

    config: Any
    vision_tower: Any
    _image_pixels_to_features: Any
    _parse_and_validate_image_input: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.set_up_selection(vllm_config)

    def embed_batch(
        self,
        images: Sequence[ImageFeatures],
        sizes: Sequence[tuple[int, int]],
        wanted: Wanted,
        text: Sequence[Tensor | None],
    ) -> list[Kept]:
        """Select of a few images, or videos, together.

        Args:
            images: their features.
            sizes: their heights and widths in pixels; empty where the model does not ask.
            wanted: what their requests ask for.
            text: the embeddings of their steering words.

        """
        raise NotImplementedError

    def places_in_prompt(
        self, spots: Tensor, size: tuple[int, int] | None, modality: str
    ) -> Tensor:
        """Return where visual tokens stand in their item's unpruned placeholder.

        Args:
            spots: ``(T,)`` their numbers among the item's visual tokens.
            size: height and width of the image in pixels, where the model asks.
            modality: of the item.

        """
        return spots

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode images or videos; those with a budget come back as their kept tokens only."""
        wanted = Wanted.take_from(kwargs)
        if wanted is None:
            return super().embed_multimodal(**kwargs)
        pixels, sizes = self.read_pixels(wanted.modality, kwargs)
        text = self.embed_queries(wanted.queries)
        totals: list[int] = []
        kept: list[Kept] = []
        for batch in self.encoder_batches([self.salient_tower.tokens * len(k) for k in pixels]):
            images = self.features_of(pixels[batch], wanted[batch])
            kept += self.embed_batch(images, sizes[batch], wanted[batch], text[batch])
            totals += [image.saliency.numel() for image in images]
        self.trace(totals, [each.order for each in kept], wanted.queries)
        every = sizes if sizes else [None] * len(kept)
        return [
            self.finished(each, gap, size, wanted.modality)
            for each, gap, size in zip(kept, wanted.gaps, every, strict=True)
        ]

    def finished(self, kept: Kept, gap: int, size: tuple[int, int] | None, modality: str) -> Tensor:
        """Return what an item's placeholder stands for.

        Args:
            kept: what stays of it.
            gap: positions that dropped tokens keep free, where they do.
            size: as of `places_in_prompt`.
            modality: likewise.

        """
        return self.in_prompt(kept, gap, lambda spots: self.places_in_prompt(spots, size, modality))

    def read_pixels(
        self, modality: str, kwargs: dict[str, Any]
    ) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """Return the pixels ``(K, 3, H, W)`` of each item's crops or frames, and the sizes.

        Args:
            modality: ``"image"``; a family with videos overrides this.
            kwargs: model inputs.

        """
        image_input = self._parse_and_validate_image_input(**kwargs)
        pixels = [
            crops if crops.dim() == 4 else crops[None] for crops in image_input["pixel_values"]
        ]
        given = image_input.get("image_sizes")
        sizes = [] if given is None else [(int(high), int(wide)) for high, wide in given]
        return pixels, sizes

    @cached_property
    def salient_tower(self) -> SalientTower:
        """The tower, which a model loaded without its vision part does not have."""
        return SalientTower(self.vision_tower, self.config)

    def places_of(self, patches: Tensor) -> Tensor:
        """Return rows and columns, ``(n, 2)``, of patches by their number in a crop."""
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        return torch.stack([patches // side, patches % side], dim=1)

    def features_of(self, pixels: Sequence[Tensor], wanted: Wanted) -> list[ImageFeatures]:
        """Run tower and projector on those items whose features are not in the cache.

        Args:
            pixels: ``(K, 3, H, W)`` of each item.
            wanted: what their requests ask for.

        """

        def encode(missing: list[int]) -> list[ImageFeatures]:
            return self.encode(
                [pixels[number] for number in missing], wanted.modality, with_keys=wanted.use_keys
            )

        return self.feature_cache.features_of(wanted.images, encode, with_keys=wanted.use_keys)

    def encode(
        self, pixels: Sequence[Tensor], modality: str, *, with_keys: bool
    ) -> list[ImageFeatures]:
        """Run tower and projector.

        Args:
            pixels: ``(K, 3, H, W)`` of each item.
            modality: of all items.
            with_keys: whether to return the keys of the tower's attention.

        """
        crops = [len(each) for each in pixels]
        encoded = self.encode_crops(torch.cat(list(pixels)), with_keys=with_keys)
        projected = self.multi_modal_projector(encoded.features)
        keys = [None] * len(crops) if encoded.keys is None else encoded.keys.split(crops)
        return [
            ImageFeatures(*each)
            for each in zip(
                encoded.features.split(crops),
                projected.split(crops),
                encoded.saliency.split(crops),
                keys,
                strict=True,
            )
        ]

    def encode_crops(self, pixels: Tensor, *, with_keys: bool) -> Encoded:
        """Run the tower on crops or frames ``(B, 3, H, W)``, up to the projector."""
        return self.salient_tower.run(
            lambda crops: self._image_pixels_to_features(self.vision_tower, crops),
            pixels,
            with_keys=with_keys,
        )

    def embed_clips(
        self, clips: Sequence[ImageFeatures], wanted: Wanted, text: Sequence[Tensor | None]
    ) -> list[Kept]:
        """Select of a few videos together; spots are time-major.

        Args:
            clips: ``K`` frames of square grids each.
            wanted: what their requests ask for.
            text: the embeddings of their steering words.

        """
        candidates = [
            clip_candidates(clip, wanted, number, text[number], math.isqrt(clip.saliency.shape[1]))
            for number, clip in enumerate(clips)
        ]
        return self.select_and_embed(candidates)


@MULTIMODAL_REGISTRY.register_processor(
    build_processor, info=_build_llava_or_pixtral_hf_info, dummy_inputs=LlavaDummyInputsBuilder
)
class PrunedLlava(LlavaSelection, LlavaForConditionalGeneration):
    """LLaVA that keeps, of each image, the tokens its request's question selects."""

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> "PrunedLlava":
        """Make a Pixtral where the configuration says so: to vLLM both are one architecture."""
        if _is_pixtral(vllm_config.model_config.hf_config):
            from flashvlm_vllm.models.pixtral import PrunedPixtral

            kind: Any = PrunedPixtral
            return super().__new__(kind)  # type: ignore[no-any-return]
        return super().__new__(cls)

    def get_mm_lora_token_counts(
        self, *, modality: str, mm_kwargs: Any, num_mm_embeds: int
    ) -> tuple[int, int | None]:
        """Count what an adapter on the tower or the projector sees: whole images."""
        if mm_kwargs is not None and field_name(KEPT, modality) in mm_kwargs:
            num_mm_embeds = self.salient_tower.tokens
        return super().get_mm_lora_token_counts(
            modality=modality, mm_kwargs=mm_kwargs, num_mm_embeds=num_mm_embeds
        )

    def embed_batch(
        self,
        images: Sequence[ImageFeatures],
        sizes: Sequence[tuple[int, int]],
        wanted: Wanted,
        text: Sequence[Tensor | None],
    ) -> list[Kept]:
        """Select of a few images together; spots are patches in raster order."""
        places = self.places_of(
            torch.arange(self.salient_tower.tokens, device=images[0].projected.device)
        )
        candidates = [
            Candidates(
                wanted.selectors[number],
                wanted.identities[number],
                wanted.kept[number],
                image.projected[0],
                image.features[0],
                image.saliency[0],
                text[number],
                None if image.keys is None else image.keys[0],
                places,
            )
            for number, image in enumerate(images)
        ]
        return self.select_and_embed(candidates)


def _is_pixtral(config: Any) -> bool:
    return isinstance(config.vision_config, PixtralVisionConfig)
