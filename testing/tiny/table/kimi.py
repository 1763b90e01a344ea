# SPDX-License-Identifier: Apache-2.0
"""Kimi-VL: MoonViT before a DeepSeek V2 with latent attention and experts."""

from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerFast

from testing.tiny.table.entry import TinyModel
from testing.tiny.table.parts import TOWER, text, with_code, write_config
from testing.tiny.words import HIDDEN, chat_template, token_id, tokenizer_for

START, CONTENT, PAD, END = "<|media_start|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>"
IMAGE: Final = f"{START}image{CONTENT}{PAD}{END}"


def _language(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return text(
        tokenizer,
        model_type="deepseek_v2",
        q_lora_rank=None,
        kv_lora_rank=512,  # vLLM's kernels know this size and the next
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        scoring_func="softmax",
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        first_k_dense_replace=1,
    )


def _kimi_vl(folder: Path) -> None:
    tokenizer = tokenizer_for(chat_template(IMAGE), (START, CONTENT, PAD, END))
    config = {
        "model_type": "kimi_vl",
        "vision_config": {
            **TOWER,
            "model_type": "moonvit",
            "patch_size": 14,
            "init_pos_emb_height": 16,
            "init_pos_emb_width": 16,
            "merge_kernel_size": [2, 2],
        },
        "text_config": _language(tokenizer),
        "media_placeholder_token_id": token_id(tokenizer, PAD),
        "pad_token_id": tokenizer.pad_token_id,
    }
    write_config(folder, "KimiVLForConditionalGeneration", config)
    with_code(folder, tokenizer, "kimi_vl", "KimiVLProcessor")


ENTRIES: Final = (
    TinyModel(
        "KimiVLForConditionalGeneration",
        _kimi_vl,
        image=IMAGE,
        engine={"trust_remote_code": True},
    ),
)
