# SPDX-License-Identifier: Apache-2.0
"""GLM-4.1V's relatives: a mixture of experts (GLM-4.5V, 4.6V), and GLM-OCR."""

from pathlib import Path
from typing import Any

from transformers import (
    Glm4vImageProcessor,
    Glm4vMoeConfig,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    Glm46VImageProcessor,
    Glm46VProcessor,
    Glm46VVideoProcessor,
    GlmOcrConfig,
)

from testing.tiny.glm4_1v import IMAGE, VIDEO, VISION, glm_tokenizer, save_processor
from testing.tiny.table.entry import TinyModel
from testing.tiny.words import rotary, text_settings

_TEXT: dict[str, Any] = {
    "layers": 2,
    "max_position_embeddings": 32768,
    "head_dim": 32,
    "rope_parameters": rotary([2, 3, 3], partial_rotary_factor=0.5),
}
_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "use_qk_norm": False,
}


def _entry(
    architecture: str, config: Any, processor: tuple[Any, Any, Any], **text: Any
) -> TinyModel:
    def write(folder: Path) -> None:
        tokenizer, ids = glm_tokenizer()
        config(
            architectures=[architecture],
            **ids,
            tie_word_embeddings=False,
            vision_config=VISION,
            text_config=text_settings(tokenizer, **_TEXT, **text),
        ).save_pretrained(folder)
        save_processor(*processor, tokenizer, folder)

    return TinyModel(
        architecture,
        write,
        image=IMAGE,
        video=VIDEO,
        template="[gMASK]<sop><|user|>\n{items}{question}<|assistant|>\n",
    )


ENTRIES = (
    _entry(
        "Glm4vMoeForConditionalGeneration",
        Glm4vMoeConfig,
        (Glm4vProcessor, Glm4vImageProcessor, Glm4vVideoProcessor),
        **_EXPERTS,
    ),
    _entry(
        "GlmOcrForConditionalGeneration",
        GlmOcrConfig,
        (Glm46VProcessor, Glm46VImageProcessor, Glm46VVideoProcessor),
    ),
)
