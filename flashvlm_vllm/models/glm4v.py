# SPDX-License-Identifier: Apache-2.0
"""GLM-4V-9B (``GLM4VForCausalLM``, based on CogVLM); vLLM serves one image per prompt."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from vllm.model_executor.models.glm4v import (
    GLM4VDummyInputsBuilder,
    GLM4VForCausalLM,
    GLM4VMultiModalProcessor,
    GLM4VProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing.processor import PromptUpdateInfo
from vllm.utils.torch_utils import async_tensor_h2d

from flashvlm_vllm.models.layouts.crops import CropModel
from flashvlm_vllm.processing.family import NO_ARGUMENTS
from flashvlm_vllm.processing.processor import VisualTokenProcessor
from flashvlm_vllm.request.budget import TokenCount
from flashvlm_vllm.vision.cls_tower import ClsTower
from flashvlm_vllm.vision.tap import inputs_of
from flashvlm_vllm.worker.candidates import Item
from flashvlm_vllm.worker.feature_cache import ImageFeatures
from flashvlm_vllm.worker.kept import Kept

_MERGE = 2
"""Side, in patches, of the square that the convolution merges into one token."""


class PrunedGlm4vProcessor(VisualTokenProcessor, GLM4VMultiModalProcessor):
    """GLM-4V's processor: begin and end tokens are kept and do not count towards the budget."""

    def count_image_tokens(
        self, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> TokenCount:
        """Count the visual tokens, the same number for every image."""
        total = self.info.get_num_image_tokens()
        return TokenCount(total, total)

    def shorten_placeholder(self, whole: PromptUpdateInfo, count: TokenCount, keep: int) -> Any:
        """Shorten the run between begin and end. Those get embeddings from the tower too."""
        if not isinstance(whole, list) or len(whole) != count.total + 2:
            raise TypeError("a GLM-4V placeholder must be visual tokens between a begin and an end")
        begin, *tokens, end = whole
        return [begin, *tokens[:keep], end]

    def placeholder_ids(self) -> list[int]:
        """Return the ids of an image's begin, visual and end tokens."""
        config = self.info.get_hf_config()
        return [config.boi_token_id, config.pad_token_id, config.eoi_token_id]


@MULTIMODAL_REGISTRY.register_processor(
    PrunedGlm4vProcessor, info=GLM4VProcessingInfo, dummy_inputs=GLM4VDummyInputsBuilder
)
class PrunedGlm4v(CropModel, GLM4VForCausalLM):
    """GLM-4V with visual token selection."""

    @property
    def language_model(self) -> Any:
        """The module with the text embeddings."""
        return self.transformer

    def multi_modal_projector(self, features: Tensor) -> Tensor:
        """Project the output of the convolution, as vLLM's tower does."""
        vision = self.transformer.vision
        projected: Tensor = vision.linear_proj(features) / vision.scaling_factor
        return projected

    @cached_property
    def salient_tower(self) -> Any:
        """The vision tower; an error if the model is loaded without it."""
        return EvaTower(self.transformer.vision, self.config.vision_config)

    uses: ClassVar[tuple[str, ...]] = ("embed_multimodal", "_parse_and_validate_image_input")

    def read_items(self, modality: str, kwargs: dict[str, Any]) -> list[Item]:
        """Read images; their sizes are not needed."""
        image_input: Any = self._parse_and_validate_image_input(**kwargs)
        pixels = image_input["data"].to(dtype=self.config.dtype)
        return self.items_of(list(pixels[:, None]), modality)

    def encode(self, items: Sequence[Item], *, with_keys: bool) -> list[ImageFeatures]:
        """Run tower, convolution and projector."""
        pixels = torch.cat([each.pixels for each in items])
        encoded: ImageFeatures = self.salient_tower.run(pixels, with_keys=with_keys)
        return encoded.split([len(each.pixels) for each in items])

    def finish(
        self, items: Sequence[Item], kept: Sequence[Kept], gaps: Sequence[int]
    ) -> list[Tensor]:
        """Put begin and end around the kept tokens; spots index the tokens between them."""
        return [self._between_ends(each, gap) for each, gap in zip(kept, gaps, strict=True)]

    def _between_ends(self, kept: Kept, gap: int) -> Tensor:
        vision = self.transformer.vision
        begin, end = (each[0] / vision.scaling_factor for each in (vision.boi, vision.eoi))
        if gap <= 0:
            return torch.cat([begin, kept.rows, end])
        kept = kept.ascending()
        ends = async_tensor_h2d(torch.tensor([0, self.salient_tower.tokens + 1]), begin.device)
        places = torch.cat([ends[:1], kept.spots + 1, ends[1:]])
        return self.placed(torch.cat([begin, kept.rows, end]), places, gap)


class EvaTower:
    """GLM-4V's EVA tower; a token's saliency is the CLS token's attention to its patches."""

    def __init__(self, vision: Any, config: dict[str, Any]) -> None:
        """Attach to ``vision``, vLLM's tower with configuration ``config``."""
        self._vision = vision
        self._tower = ClsTower(
            vision.transformer.layers[-1].attention.attn,
            config["num_heads"],
            is_data_parallel=False,
        )
        self._side = config["image_size"] // config["patch_size"]
        self.tokens = (self._side // _MERGE) ** 2
        """Visual tokens per image, without begin and end."""

    def run(self, pixels: Tensor, *, with_keys: bool) -> ImageFeatures:
        """Encode ``(B, 3, H, W)``; saliency and keys are averaged over the patches of a token."""
        with inputs_of(self._vision.linear_proj) as features:
            encoded = self._tower.run(self._vision, pixels, with_keys=with_keys)
        keys = encoded.keys
        return ImageFeatures(
            torch.cat(features),
            encoded.features[:, 1:-1],
            self._averaged(encoded.saliency[..., None])[..., 0],
            None if keys is None else self._averaged(keys.flatten(2)).unflatten(2, keys.shape[2:]),
        )

    def _averaged(self, values: Tensor) -> Tensor:
        grid = values.unflatten(1, (self._side, self._side)).movedim(-1, 1)
        return avg_pool2d(grid, _MERGE).flatten(2).transpose(1, 2)
