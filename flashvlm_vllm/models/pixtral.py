# SPDX-License-Identifier: Apache-2.0
"""Pixtral in Transformers' format, which vLLM serves by LLaVA's class."""

from typing import Any

from torch import Tensor
from vllm.model_executor.models.llava import PixtralHFMultiModalProcessor

from flashvlm_vllm.fields import KEPT, field_name
from flashvlm_vllm.models.llava import PrunedLlava
from flashvlm_vllm.models.packed import PackedSelection, RowsProcessor


class PrunedPixtralProcessor(RowsProcessor, PixtralHFMultiModalProcessor):
    """Pixtral's processor: rows and columns follow from the image's size."""

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return columns and rows of the tokens of an image."""
        encoder: Any = self.info.get_vision_encoder_info()
        columns, rows = encoder.get_patch_grid_size(image_width=width, image_height=height)
        return columns, rows


class PrunedPixtral(PackedSelection, PrunedLlava):
    """Pixtral that keeps, of each image, the tokens its request's question selects."""

    def project(self, patches: Tensor, sizes: Any) -> tuple[Tensor, Tensor]:
        """Make a token of each patch."""
        return patches, self.multi_modal_projector(patches)

    def get_mm_lora_token_counts(
        self, *, modality: str, mm_kwargs: Any, num_mm_embeds: int
    ) -> tuple[int, int | None]:
        """Count what an adapter on the tower or the projector sees: whole images."""
        if mm_kwargs is not None and field_name(KEPT, modality) in mm_kwargs:
            rows, columns = self._grid(mm_kwargs["pixel_values"].data)
            num_mm_embeds = rows * columns
        return num_mm_embeds, num_mm_embeds
