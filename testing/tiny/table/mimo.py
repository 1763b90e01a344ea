# SPDX-License-Identifier: Apache-2.0
"""MiMo-V2-Omni without its audio encoder; no layer has windows: vLLM needs Triton for these."""

from pathlib import Path
from typing import Final

from testing.tiny.table.entry import TinyModel
from testing.tiny.table.folder import (
    HEADS,
    HIDDEN,
    LAYERS,
    save_marked,
    text_fields,
    write_config,
    write_configuration,
)
from testing.tiny.table.patches import SIDE, UNIT, window_tower
from testing.tiny.words import token_id

_MARKS: Final = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "video_start_token_id": "<|video_start|>",
    "video_end_token_id": "<|video_end|>",
    "audio_token_id": "<|audio_pad|>",
    "audio_start_token_id": "<|mimo_audio_start|>",
    "audio_end_token_id": "<|mimo_audio_end|>",
}


def _write(folder: Path) -> None:
    tokenizer = save_marked(folder, *_MARKS.values())
    head = HIDDEN // HEADS
    ids = {field: token_id(tokenizer, mark) for field, mark in _MARKS.items()}
    parts = {"vision_config": "vllm.transformers_utils.configs.mimo_v2_omni.Mimo_VLVisionConfig"}
    config = {
        **write_configuration(folder, "mimo_v2_omni", parts),
        **text_fields(tokenizer, head_dim=head, v_head_dim=head, attention_bias=True),
        "hidden_act": "silu",
        "layernorm_epsilon": 1e-6,
        "hybrid_layer_pattern": [0] * LAYERS,
        "moe_layer_freq": [0] * LAYERS,
        "n_routed_experts": None,
        "sliding_window": None,
        "sliding_window_size": 512,
        "rope_theta": 10_000.0,
        **{field: ids[field] for field in list(ids)[:4]},
        "vision_config": window_tower(
            hidden_act="silu",
            num_key_value_heads=1,
            kv_channels=head,
            qk_channels=head,
            use_sink=False,
            fullatt_block_indexes=list(range(LAYERS)),
        ),
        "processor_config": {
            **ids,
            "image_min_pixels": 4 * UNIT**2,
            "image_max_pixels": SIDE**2,
            "video_min_pixels": 4 * UNIT**2,
            "video_max_pixels": SIDE**2,
            "video_total_max_pixels": 8 * SIDE**2,
            "max_frames": 8,
        },
    }
    write_config(folder, "MiMoV2OmniForCausalLM", config)


ENTRIES: Final = [
    TinyModel(
        architecture="MiMoV2OmniForCausalLM",
        write=_write,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        video="<|vision_start|><|video_pad|><|vision_end|>",
        engine={"trust_remote_code": True},
    ),
]
