# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL and Qwen3.5 with a mixture of experts."""

from pathlib import Path
from typing import Any

from transformers import Qwen3_5MoeConfig, Qwen3VLMoeConfig

from testing.tiny.qwen3_vl import VISION, save_processor
from testing.tiny.qwen_vl import CHATML, IMAGE, MARKS, VIDEO, mark_ids
from testing.tiny.table.entry import TinyModel
from testing.tiny.words import rotary, text_settings, tokenizer_for

_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "head_dim": 32,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
_TEXT: dict[str, dict[str, Any]] = {
    "Qwen3VLMoeForConditionalGeneration": {
        "rope_parameters": rotary([6, 5, 5], mrope_interleaved=True),
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
    "Qwen3_5MoeForConditionalGeneration": {
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "shared_expert_intermediate_size": 64,
        "rope_parameters": rotary([3, 3, 2], partial_rotary_factor=0.5, mrope_interleaved=True),
    },
}


def _entry(architecture: str, config: Any, vision: dict[str, Any], **engine: Any) -> TinyModel:
    def write(folder: Path) -> None:
        tokenizer = tokenizer_for(CHATML, MARKS)
        text = text_settings(tokenizer, layers=3, **_EXPERTS, **_TEXT[architecture])
        config(
            architectures=[architecture],
            **mark_ids(tokenizer),
            tie_word_embeddings=False,
            vision_config=vision,
            text_config=text,
        ).save_pretrained(folder)
        save_processor(tokenizer, folder)

    return TinyModel(
        architecture,
        write,
        image=f"<|vision_start|>{IMAGE}<|vision_end|>",
        video=f"<|vision_start|>{VIDEO}<|vision_end|>",
        template="<|im_start|>user\n{items}{question}<|im_end|>\n<|im_start|>assistant\n",
        engine=engine,
    )


ENTRIES = (
    _entry(
        "Qwen3VLMoeForConditionalGeneration",
        Qwen3VLMoeConfig,
        {**VISION, "deepstack_visual_indexes": [0, 1]},
    ),
    # vLLM's linear attention on CPU supports bfloat16 only.
    _entry("Qwen3_5MoeForConditionalGeneration", Qwen3_5MoeConfig, VISION, dtype="bfloat16"),
)
