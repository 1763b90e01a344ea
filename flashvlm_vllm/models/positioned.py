# SPDX-License-Identifier: Apache-2.0
"""What a prompt must be like for the kept tokens of its items to keep their 3-D positions."""

from dataclasses import replace
from typing import Any, ClassVar

from vllm.multimodal.processing.inputs import ProcessorInputs

from flashvlm_vllm.budget import BUDGET
from flashvlm_vllm.fields import MODALITIES
from flashvlm_vllm.models.positions import has_text_around
from flashvlm_vllm.plan import is_pruned_identity
from flashvlm_vllm.processing import VisualTokenProcessor
from flashvlm_vllm.refusal import Reason, Refusal


class PositionedProcessor(VisualTokenProcessor):
    """Mixin of a processor of an M-RoPE model."""

    can_merge = False
    """A merged token has no place in the picture, and M-RoPE needs one."""
    marks: ClassVar[str] = "<|vision_start|>, <|vision_end|>"
    """What chat templates write around an item."""

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """Process one prompt.

        Under a default budget, a prompt that has no text where it is needed stays whole: nobody
        chose the budget for it.

        Raises:
            Refusal: as of any model; or there is no text behind a pruned item, or
                between it and another, and the request asks for a budget.

        """
        result = super().apply(inputs, timing_ctx)
        item = _item_without_text(result)
        if item is None:
            return result
        if BUDGET not in inputs.hf_processor_mm_kwargs:
            whole = {**inputs.hf_processor_mm_kwargs, BUDGET: None}
            return super().apply(replace(inputs, hf_processor_mm_kwargs=whole), timing_ctx)
        raise Refusal(
            Reason.NO_TEXT_BETWEEN,
            f"{BUDGET}: {item} needs a token of text behind it and between it and other images or "
            f"videos, as chat templates write them ({self.marks}): its positions are counted "
            "from there",
            parameter=BUDGET,
        )


def _item_without_text(result: Any) -> str | None:
    """Name the first pruned item of a processed prompt whose positions could not be counted."""
    items = [
        (f"{modality} {number}", placeholder, identity)
        for modality in MODALITIES
        for number, (placeholder, identity) in enumerate(
            zip(
                result["mm_placeholders"].get(modality, ()),
                result["mm_hashes"].get(modality, ()),
                strict=True,
            )
        )
    ]
    tokens = len(result["prompt_token_ids"])
    for name, place, identity in items:
        others = [other for _, other, _ in items if other is not place]
        if is_pruned_identity(identity) and not has_text_around(
            place.offset, place.length, tokens, others
        ):
            return name
    return None
