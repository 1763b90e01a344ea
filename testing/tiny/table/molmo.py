# SPDX-License-Identifier: Apache-2.0
"""Molmo and Molmo2. vLLM builds Molmo's tower at its public size, CLIP's at 336 px."""

from pathlib import Path
from typing import Final

from testing.tiny.table.entry import TinyModel
from testing.tiny.table.folder import (
    HEADS,
    HIDDEN,
    LAYERS,
    save_marked,
    text_fields,
    vision_fields,
    vocabulary,
    write_config,
    write_configuration,
    write_processor,
)
from testing.tiny.words import token_id

SIDE: Final = 112


def _write_molmo(folder: Path) -> None:
    marks = ("<|endoftext|>", "<im_patch>", "<im_col>", "<im_start>", "<im_end>")
    tokenizer = save_marked(folder, *marks)
    config = {
        **write_configuration(folder, "molmo", {}),
        **text_fields(
            tokenizer,
            embedding_size=vocabulary(tokenizer),
            qkv_bias=True,
            attention_layer_norm=False,
            layer_norm_type="rms",
            layer_norm_eps=1e-6,
            norm_after=False,
            weight_tying=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        ),
    }
    write_config(folder, "MolmoForCausalLM", config)
    write_processor(folder, "MolmoProcessor", source="processing_molmo")


def _write_molmo2(folder: Path) -> None:
    names = {
        "image_patch_id": "<im_patch>",
        "image_col_id": "<im_col>",
        "image_start_token_id": "<im_start>",
        "image_end_token_id": "<im_end>",
        "low_res_image_start_token_id": "<low_res_im_start>",
        "image_low_res_id": "<im_low>",
        "frame_start_token_id": "<frame_start>",
        "frame_end_token_id": "<frame_end>",
    }
    tokenizer = save_marked(folder, "<|image|>", "<|video|>", *names.values())
    heads = {
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
    }
    parts = dict.fromkeys(("text_config", "vit_config", "adapter_config"), "PretrainedConfig")
    config = {
        **write_configuration(folder, "molmo2", parts),
        **{field: token_id(tokenizer, mark) for field, mark in names.items()},
        "text_config": text_fields(
            tokenizer,
            head_dim=HIDDEN // HEADS,
            additional_vocab_size=0,
            qkv_bias=True,
            hidden_act="silu",
            rope_theta=10_000.0,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            use_qk_norm=True,
            qk_norm_type="qwen3",
            layer_norm_eps=1e-6,
            norm_after=False,
            rope_scaling_layers=None,
        ),
        "vit_config": {
            **vision_fields(**heads, num_hidden_layers=3),
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "image_default_input_size": [SIDE, SIDE],
            "image_patch_size": 14,
            "image_num_pos": (SIDE // 14) ** 2,
        },
        "adapter_config": {
            **heads,
            "vit_layers": [-1, -LAYERS],
            "pooling_attention_mask": True,
            "hidden_size": HIDDEN,
            "hidden_act": "silu",
            "intermediate_size": 2 * HIDDEN,
            "text_hidden_size": HIDDEN,
        },
    }
    write_config(folder, "Molmo2ForConditionalGeneration", config)
    write_processor(folder, "Molmo2Processor", source="processing_molmo")


ENTRIES: Final = [
    TinyModel(
        architecture="MolmoForCausalLM",
        write=_write_molmo,
        image="",  # images stand before all text
        engine={"trust_remote_code": True},
    ),
    TinyModel(
        architecture="Molmo2ForConditionalGeneration",
        write=_write_molmo2,
        image="<|image|>",
        video="<|video|>",
        engine={"trust_remote_code": True},
    ),
]
