# SPDX-License-Identifier: Apache-2.0
"""Models made after InternVL in OpenGVLab's format. vLLM serves their images only."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

from vllm.model_executor.models.eagle2_5_vl import (
    Eagle2_5_VLDummyInputsBuilder,
    Eagle2_5_VLForConditionalGeneration,
    Eagle2_5_VLMultiModalProcessor,
    Eagle2_5_VLProcessingInfo,
)
from vllm.model_executor.models.h2ovl import (
    H2OVLChatModel,
    H2OVLMultiModalProcessor,
    H2OVLProcessingInfo,
)
from vllm.model_executor.models.internvl import (
    BaseInternVLDummyInputsBuilder,
    BaseInternVLMultiModalProcessor,
)
from vllm.model_executor.models.nvlm_d import (
    NVLM_D_Model,
    NVLMDummyInputsBuilder,
    NVLMMultiModalProcessor,
    NVLMProcessingInfo,
)
from vllm.model_executor.models.qianfan_ocr import (
    QianfanOCRForConditionalGeneration,
    QianfanOCRProcessingInfo,
)
from vllm.model_executor.models.skyworkr1v import SkyworkR1VChatModel, SkyworkR1VProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing.inputs import ProcessorInputs

from flashvlm_vllm.ipc.explain_request import Placed
from flashvlm_vllm.models.internvl import InternChatModel, InternChatProcessor
from flashvlm_vllm.models.layouts.tiles import TileModel
from flashvlm_vllm.processing.family import NO_ARGUMENTS
from flashvlm_vllm.vision.clip_siglip import SalientTower


class PrunedChatProcessor(InternChatProcessor, BaseInternVLMultiModalProcessor[Any]):
    """The processor of Skywork-R1V and Qianfan-OCR."""


class _ImagesOnly(InternChatModel):
    """Mixin of a model whose class in vLLM has no videos."""

    uses: ClassVar[tuple[str, ...]] = (
        *TileModel.uses,
        "extract_feature",
        "pixel_shuffle",
        "_parse_and_validate_image_input",
    )


@MULTIMODAL_REGISTRY.register_processor(
    PrunedChatProcessor, info=SkyworkR1VProcessingInfo, dummy_inputs=BaseInternVLDummyInputsBuilder
)
class PrunedSkyworkR1V(_ImagesOnly, SkyworkR1VChatModel):
    """Skywork-R1V with visual token selection."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedChatProcessor, info=QianfanOCRProcessingInfo, dummy_inputs=BaseInternVLDummyInputsBuilder
)
class PrunedQianfanOCR(InternChatModel, QianfanOCRForConditionalGeneration):
    """Qianfan-OCR with visual token selection."""


class PrunedEagleProcessor(InternChatProcessor, Eagle2_5_VLMultiModalProcessor):
    """Eagle 2.5's processor."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedEagleProcessor,
    info=Eagle2_5_VLProcessingInfo,
    dummy_inputs=Eagle2_5_VLDummyInputsBuilder,
)
class PrunedEagle(_ImagesOnly, Eagle2_5_VLForConditionalGeneration):
    """Eagle 2.5 with visual token selection."""

    @cached_property
    def cls_tower(self) -> SalientTower:  # type: ignore[override]
        """The tower, a SigLIP, which has no CLS token."""
        return SalientTower(self.vision_model, self.config)


class PrunedH2OVLProcessor(InternChatProcessor, H2OVLMultiModalProcessor):
    """H2OVL's processor. A single image is cut into tiles twice (``use_msac``)."""

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """Process one prompt. What vLLM does for several images is said for each of them."""
        if inputs.mm_data_items.get_count("image", strict=False) > 1:
            arguments = {"use_msac": False, **inputs.hf_processor_mm_kwargs}
            inputs = replace(inputs, hf_processor_mm_kwargs=arguments)
        return super().apply(inputs, timing_ctx)

    def part_regions(
        self, modality: str, width: int, height: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> dict[int, Placed]:
        """Return no region where tiles overlap; else those of InternVL."""
        if self.hf_processor(arguments).image_processor.use_msac:
            return {}
        return super().part_regions(modality, width, height, arguments)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedH2OVLProcessor, info=H2OVLProcessingInfo, dummy_inputs=BaseInternVLDummyInputsBuilder
)
class PrunedH2OVL(InternChatModel, H2OVLChatModel):
    """H2OVL with visual token selection."""


class PrunedNVLMProcessor(InternChatProcessor, NVLMMultiModalProcessor):
    """NVLM-D's processor. Every tile has a tag before it."""

    text_between = "image"

    @property
    def visual_token(self) -> int:
        """The id of an image's visual tokens."""
        token: int = self.hf_processor().ctx_image_token_id
        return token

    def whole_placeholder(self, items: Any, number: int, arguments: Mapping[str, Any]) -> list[int]:
        """Return the placeholder of an unpruned image."""
        size = items.get_image_size(number)
        processor = self.hf_processor(arguments)
        total = self.count_image_tokens(size.width, size.height, arguments).total
        placeholder = processor.get_image_repl(total // processor.image_seq_length)
        newline = self.info.get_tokenizer().encode("\n", add_special_tokens=False)
        return [*placeholder.full, *newline]


@MULTIMODAL_REGISTRY.register_processor(
    PrunedNVLMProcessor, info=NVLMProcessingInfo, dummy_inputs=NVLMDummyInputsBuilder
)
class PrunedNVLM(InternChatModel, NVLM_D_Model):
    """NVLM-D with visual token selection."""
