# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 and similar models with a CLIP or SigLIP tower, and Pixtral.

vLLM serves Pixtral in Transformers' format with LLaVA's class, so both are one architecture here.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PixtralVisionConfig
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    PixtralHFMultiModalProcessor,
    _build_llava_or_pixtral_hf_info,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from flashvlm_vllm.ipc.explain_request import Placed
from flashvlm_vllm.models.layouts.crops import CropModel
from flashvlm_vllm.models.layouts.regions import cropped
from flashvlm_vllm.models.layouts.rows import RowModel, RowProcessor
from flashvlm_vllm.processing.family import NO_ARGUMENTS
from flashvlm_vllm.processing.processor import VisualTokenProcessor


class PrunedLlavaProcessor(VisualTokenProcessor, LlavaMultiModalProcessor):
    """LLaVA-1.5's processor: every image has as many tokens as the tower has patches."""

    def part_regions(
        self, modality: str, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> dict[int, Placed]:
        """Return the part of the image that the tower encodes; CLIP's processors crop images."""
        return cropped(self.info.get_hf_processor().image_processor, width, height)


class PrunedPixtralProcessor(RowProcessor, PixtralHFMultiModalProcessor):
    """Pixtral's processor: rows and columns depend on the image's size."""

    def grid(self, width: int, height: int, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Return the number of token columns and rows of an image."""
        encoder: Any = self.info.get_vision_encoder_info()
        columns, rows = encoder.get_patch_grid_size(image_width=width, image_height=height)
        return columns, rows


def build_processor(info: Any, dummy_inputs: Any, **kwargs: Any) -> Any:
    """Create the processor of LLaVA or of Pixtral."""
    is_pixtral = _is_pixtral(info.get_hf_config())
    processor: Any = PrunedPixtralProcessor if is_pixtral else PrunedLlavaProcessor
    return processor(info, dummy_inputs, **kwargs)


@MULTIMODAL_REGISTRY.register_processor(
    build_processor, info=_build_llava_or_pixtral_hf_info, dummy_inputs=LlavaDummyInputsBuilder
)
class PrunedLlava(CropModel, LlavaForConditionalGeneration):
    """LLaVA with visual token selection."""

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> "PrunedLlava":
        """Create a `PrunedPixtral` if the configuration is Pixtral's."""
        if _is_pixtral(vllm_config.model_config.hf_config):
            kind: Any = PrunedPixtral
            return super().__new__(kind)  # type: ignore[no-any-return]
        return super().__new__(cls)


class PrunedPixtral(RowModel, PrunedLlava):
    """Pixtral with visual token selection."""

    def project(self, patches: Tensor, sizes: Any) -> tuple[Tensor, Tensor]:
        """Project each patch to a token."""
        return patches, self.multi_modal_projector(patches)


def _is_pixtral(config: Any) -> bool:
    return isinstance(config.vision_config, PixtralVisionConfig)
