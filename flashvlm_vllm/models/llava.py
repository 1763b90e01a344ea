# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 and its relatives with a CLIP or SigLIP tower."""

from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PixtralVisionConfig
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    _build_llava_or_pixtral_hf_info,
    _build_llava_or_pixtral_hf_processor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from flashvlm_vllm.models.pruning import Candidates, VisualTokenSelection, Wanted
from flashvlm_vllm.processing import KEPT_FIELD, VisualTokenProcessor
from flashvlm_vllm.vision.tower import SalientTower


class PrunedLlavaProcessor(VisualTokenProcessor, LlavaMultiModalProcessor):
    """LLaVA-1.5's processor: every image has the tower's number of tokens."""


def build_processor(info: Any, dummy_inputs: Any, **kwargs: Any) -> Any:
    """Build the pruning processor; Pixtral, served by the same class in vLLM, stays stock."""
    if isinstance(info.get_hf_config().vision_config, PixtralVisionConfig):
        return _build_llava_or_pixtral_hf_processor(info, dummy_inputs, **kwargs)
    return PrunedLlavaProcessor(info, dummy_inputs, **kwargs)


@MULTIMODAL_REGISTRY.register_processor(
    build_processor, info=_build_llava_or_pixtral_hf_info, dummy_inputs=LlavaDummyInputsBuilder
)
class PrunedLlava(VisualTokenSelection, LlavaForConditionalGeneration):
    """LLaVA that keeps, of each image, the tokens its request's question selects."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.set_up_selection(vllm_config)

    @cached_property
    def _salient_tower(self) -> SalientTower:
        return SalientTower(self.vision_tower, self.config)

    def get_mm_lora_token_counts(
        self, *, modality: str, mm_kwargs: Any, num_mm_embeds: int
    ) -> tuple[int, int | None]:
        """Count what an adapter on the tower or the projector sees: whole images."""
        if mm_kwargs is not None and KEPT_FIELD in mm_kwargs:
            num_mm_embeds = self._salient_tower.tokens
        return super().get_mm_lora_token_counts(
            modality=modality, mm_kwargs=mm_kwargs, num_mm_embeds=num_mm_embeds
        )

    def _encode(self, pixels: Tensor) -> Any:
        return self._image_pixels_to_features(self.vision_tower, pixels)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode images; those with a budget come back as their kept tokens only."""
        wanted = Wanted.take_from(kwargs)
        if wanted is None:
            return super().embed_multimodal(**kwargs)
        image_input = self._parse_and_validate_image_input(**kwargs)
        assert image_input is not None, "the processor adds budgets to pixels only"
        pixels = image_input["pixel_values"]
        text = self.embed_queries(wanted.queries)
        totals = [self._salient_tower.tokens] * len(wanted.kept)
        kept: list[Tensor] = []
        embeddings: list[Tensor] = []
        for batch in self.encoder_batches(totals):
            features, saliency = self._salient_tower.run(
                self._encode,
                pixels[batch],
            )
            projected = self.multi_modal_projector(features)
            rows = self.select(
                [
                    Candidates(*each)
                    for each in zip(
                        wanted.identities[batch],
                        wanted.kept[batch],
                        projected,
                        saliency,
                        text[batch],
                        features,
                        strict=True,
                    )
                ]
            )
            embeddings += [
                image[kept_rows] for image, kept_rows in zip(projected, rows, strict=True)
            ]
            kept += rows
        self.trace(totals, kept, wanted.queries)
        return embeddings
