# SPDX-License-Identifier: Apache-2.0
"""Gemma 3: a token is the mean of several patches; pan-and-scan crops share the image's budget.

Image tokens attend to each other in both directions, if vLLM's attention backend supports that. The
backend uses the placeholder's range, so this also holds for kept tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.model_executor.models.gemma3_mm import (
    Gemma3DummyInputsBuilder,
    Gemma3ForConditionalGeneration,
    Gemma3MultiModalProcessor,
    Gemma3ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from flashvlm_vllm.models.layouts.tiles import TileModel
from flashvlm_vllm.processing.family import NO_ARGUMENTS
from flashvlm_vllm.processing.processor import VisualTokenProcessor
from flashvlm_vllm.request.budget import TokenCount, spread_budget
from flashvlm_vllm.vision.clip_siglip import SalientTower
from flashvlm_vllm.worker.feature_cache import ImageFeatures


class PrunedGemma3Processor(VisualTokenProcessor, Gemma3MultiModalProcessor):
    """Gemma 3's processor: 256 tokens for an image and for each of its crops."""

    def count_image_tokens(
        self, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> TokenCount:
        """Count the tokens of an image and of its pan-and-scan crops."""
        total = self.info.get_num_image_tokens(
            image_width=width,
            image_height=height,
            processor=self.info.get_hf_processor(**arguments),
            mm_kwargs=arguments,
        )
        return TokenCount(total, total)

    def shorten_placeholder(self, whole: Any, count: TokenCount, keep: int) -> Any:
        """Shorten each crop's run of tokens to its share; the text between them is kept.

        Raises:
            TypeError: the number of embeddings in the placeholder differs from the count.

        """
        is_embed = whole.is_embed(whole.full).tolist()
        runs = [
            ([whole.full[at] for at in places], embedded)
            for embedded, places in groupby(range(len(is_embed)), is_embed.__getitem__)
        ]
        sizes = [len(ids) for ids, embedded in runs if embedded]
        if sum(sizes) != count.total:
            raise TypeError(
                f"an image has {count.total} visual tokens but its placeholder has {sum(sizes)}"
            )
        shares: Iterator[int] = iter(spread_budget(keep, sizes))
        shorter = [ids[: next(shares)] if embedded else ids for ids, embedded in runs]
        return replace(whole, full=[token for ids in shorter for token in ids])


@MULTIMODAL_REGISTRY.register_processor(
    PrunedGemma3Processor,
    info=Gemma3ProcessingInfo,
    dummy_inputs=Gemma3DummyInputsBuilder,
)
class PrunedGemma3(TileModel, Gemma3ForConditionalGeneration):
    """Gemma 3 with visual token selection."""

    uses: ClassVar[tuple[str, ...]] = (*TileModel.uses, "_parse_and_validate_image_input")

    @cached_property
    def salient_tower(self) -> SalientTower:
        """The vision tower; an error if the model is loaded without it."""
        return SalientTower(self.vision_tower, self.config)

    @property
    def tile_tokens(self) -> int:
        """Number of tokens of an image or a crop."""
        tokens: int = self.multi_modal_projector.tokens_per_side**2
        return tokens

    @cached_property
    def tile_places(self) -> Tensor:
        """Rows and columns ``(n, 2)`` of the tokens."""
        side: int = self.multi_modal_projector.tokens_per_side
        device = self.multi_modal_projector.mm_input_projection_weight.device
        numbers = torch.arange(side * side, device=device)
        return torch.stack([numbers // side, numbers % side], dim=1)

    def dropped_before(
        self, feature: Any, ids: Sequence[int], is_embed: NDArray[np.bool_], dropped: int
    ) -> NDArray[np.int64]:
        """Return the number of tokens dropped from the image and crops before each text token."""
        begins = np.asarray(ids) == self.config.boi_token_index
        whole: NDArray[np.int64] = (np.cumsum(begins) - begins) * self.tile_tokens
        return whole - np.cumsum(is_embed)

    def read_tiles(self, kwargs: dict[str, Any], *, is_video: bool) -> tuple[Tensor, list[int]]:
        """Return all images and crops, ``(B, 3, H, W)``, and the number of them for each item."""
        parsed: Any = self._parse_and_validate_image_input(**kwargs)
        return parsed["pixel_values"], parsed["num_patches"].tolist()

    def encode_tiles(self, pixels: Tensor, *, with_keys: bool) -> ImageFeatures:
        """Encode tiles; features, saliency and keys of a token are the mean over its patches."""
        encoded = self.salient_tower.run(self.vision_tower, pixels, with_keys=with_keys)
        keys = None
        if encoded.keys is not None:
            heads = encoded.keys.shape[2:]
            keys = self._pooled(encoded.keys.flatten(2)).unflatten(2, heads)
        return ImageFeatures(
            self._pooled(encoded.features),
            self.multi_modal_projector(encoded.features),
            self._pooled(encoded.saliency.unsqueeze(2)).squeeze(2),
            keys,
        )

    def project_merged(self, merged: Tensor) -> Tensor:
        """Return the embeddings of merged tokens, projected like pooled tokens."""
        projector = self.multi_modal_projector
        normed = projector.mm_soft_emb_norm(merged)
        embeddings: Tensor = normed @ projector.mm_input_projection_weight
        return embeddings.type_as(merged)

    def _pooled(self, patches: Tensor) -> Tensor:
        """Average patches ``(B, N, C)`` to tokens ``(B, n, C)``, as the projector does."""
        side: int = self.multi_modal_projector.patches_per_image
        squares = patches.transpose(1, 2).unflatten(2, (side, side))
        pooled: Tensor = self.multi_modal_projector.avg_pool(squares)
        return pooled.flatten(2).transpose(1, 2)
