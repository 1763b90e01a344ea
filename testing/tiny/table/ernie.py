# SPDX-License-Identifier: Apache-2.0
"""Ernie 4.5 VL: experts of their own for words and for images, and M-RoPE."""

from pathlib import Path
from typing import Final

from testing.tiny.table.entry import TinyModel
from testing.tiny.table.parts import LAYERS, TOWER, copy_code, text, with_code, write_config
from testing.tiny.words import HIDDEN, chat_template, rotary, token_id, tokenizer_for

IMAGE: Final = "<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>"
VIDEO: Final = "<|VIDEO_START|><|video@placeholder|><|VIDEO_END|>"
PATCH: Final = "<|IMAGE_PLACEHOLDER|>"
MARKS: Final = (
    *("<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_START|>", "<|VIDEO_END|>"),
    *("<|image@placeholder|>", "<|video@placeholder|>", PATCH),
)


def _ernie(folder: Path) -> None:
    tokenizer = tokenizer_for(chat_template(IMAGE, VIDEO), MARKS)
    width = TOWER["hidden_size"]
    config = {
        **text(
            tokenizer,
            rms_norm_eps=1e-5,
            hidden_act="silu",
            rope_parameters=rotary([6, 6, 4]),
            freq_allocation=4,
            moe_num_experts=[4, 4],
            moe_intermediate_size=[HIDDEN, HIDDEN // 2],
            moe_k=2,
            moe_num_shared_experts=1,
            moe_layer_start_index=[1, 1],
            moe_layer_end_index=[1, 1],
        ),
        "model_type": "ernie4_5_moe_vl",
        "auto_map": {"AutoConfig": "language_config.ErnieConfig"},
        "vision_config": {
            "depth": LAYERS,
            "embed_dim": width,
            "hidden_size": width,
            "hidden_act": "quick_gelu",
            "num_heads": TOWER["num_attention_heads"],
            "mlp_ratio": 2,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
        "pixel_hidden_size": width,
        "spatial_conv_size": 2,
        "temporal_conv_size": 2,
        "use_temporal_conv": True,
        "im_patch_id": token_id(tokenizer, PATCH),
        "image_start_token_id": token_id(tokenizer, "<|IMAGE_START|>"),
        "image_end_token_id": token_id(tokenizer, "<|IMAGE_END|>"),
        "video_start_token_id": token_id(tokenizer, "<|VIDEO_START|>"),
        "video_end_token_id": token_id(tokenizer, "<|VIDEO_END|>"),
    }
    write_config(folder, "Ernie4_5_VLMoeForConditionalGeneration", config)
    with_code(folder, tokenizer, "ernie", "ErnieProcessor")
    copy_code(folder, "language_config")


ENTRIES: Final = (
    TinyModel(
        "Ernie4_5_VLMoeForConditionalGeneration",
        _ernie,
        image=IMAGE,
        video=VIDEO,
        engine={
            "trust_remote_code": True,
            # On a CPU vLLM calls this model's own rotation with an argument too many; without
            # the operation it calls the plain form.
            "compilation_config": {"custom_ops": ["-rotary_embedding"]},
        },
    ),
)
