# SPDX-License-Identifier: Apache-2.0
"""The thinkers of Qwen2.5-Omni and Qwen3-Omni: images, videos, audio, and M-RoPE."""

from pathlib import Path
from typing import Any, Final

from transformers import (
    Qwen2_5OmniConfig,
    Qwen2_5OmniProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeProcessor,
    WhisperFeatureExtractor,
)

from testing.tiny.table.entry import TinyModel
from testing.tiny.table.parts import LAYERS, save, text
from testing.tiny.words import HIDDEN, rotary, token_id, tokenizer_with

MARKS_2_5: Final = {
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
MARKS_3: Final = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "audio_token": "<|audio_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
AUDIO: Final[dict[str, Any]] = {
    "encoder_layers": LAYERS,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "d_model": 64,
    "output_dim": HIDDEN,
}
VISION: Final[dict[str, Any]] = {
    "depth": LAYERS,
    "num_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "out_hidden_size": HIDDEN,
}


def _processor(kind: Any, tokenizer: Any, patch: int) -> Any:
    grid = {
        "patch_size": patch,
        "size": {"shortest_edge": (2 * patch) ** 2, "longest_edge": 64 * (2 * patch) ** 2},
    }
    return kind(
        image_processor=Qwen2VLImageProcessor(**grid),
        video_processor=Qwen2VLVideoProcessor(**grid),
        feature_extractor=WhisperFeatureExtractor(feature_size=128),
        tokenizer=tokenizer,
    )


def _qwen2_5(folder: Path) -> None:
    tokenizer = tokenizer_with(MARKS_2_5)
    ids = {name: token_id(tokenizer, mark) for name, mark in MARKS_2_5.items()}
    config = Qwen2_5OmniConfig(
        thinker_config={
            "vision_config": {**VISION, "fullatt_block_indexes": [1]},
            "audio_config": AUDIO,
            "text_config": text(tokenizer, rope_parameters=rotary([4, 6, 6])),
            "audio_token_index": ids["audio_token"],
            "image_token_index": ids["image_token"],
            "video_token_index": ids["video_token"],
            "audio_start_token_id": ids["audio_bos_token"],
            "audio_end_token_id": ids["audio_eos_token"],
            "vision_start_token_id": ids["vision_bos_token"],
            "vision_end_token_id": ids["vision_eos_token"],
        },
        enable_audio_output=False,
    )
    processor = _processor(Qwen2_5OmniProcessor, tokenizer, patch=14)
    save(folder, "Qwen2_5OmniForConditionalGeneration", config, processor)


def _qwen3(folder: Path) -> None:
    tokenizer = tokenizer_with(MARKS_3)
    ids = {name: token_id(tokenizer, mark) for name, mark in MARKS_3.items()}
    config = Qwen3OmniMoeConfig(
        thinker_config={
            "vision_config": {
                **VISION,
                "num_position_embeddings": 64,
                "image_size": 128,
                "apply_vit_abs_pos_embed": True,
                "deepstack_visual_indexes": [0, 1],
            },
            "audio_config": {**AUDIO, "downsample_hidden_size": 8},
            "text_config": text(
                tokenizer,
                head_dim=32,
                rope_parameters=rotary([6, 5, 5], mrope_interleaved=True),
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=HIDDEN,
            ),
            "audio_token_id": ids["audio_token"],
            "image_token_id": ids["image_token"],
            "video_token_id": ids["video_token"],
            "audio_start_token_id": ids["audio_bos_token"],
            "audio_end_token_id": ids["audio_eos_token"],
            "vision_start_token_id": ids["vision_bos_token"],
            "vision_end_token_id": ids["vision_eos_token"],
        },
        enable_audio_output=False,
    )
    processor = _processor(Qwen3OmniMoeProcessor, tokenizer, patch=16)
    save(folder, "Qwen3OmniMoeForConditionalGeneration", config, processor)


ENTRIES: Final = (
    TinyModel(
        "Qwen2_5OmniForConditionalGeneration",
        _qwen2_5,
        image="<|vision_bos|><|IMAGE|><|vision_eos|>",
        video="<|vision_bos|><|VIDEO|><|vision_eos|>",
        audio="<|audio_bos|><|AUDIO|><|audio_eos|>",
    ),
    TinyModel(
        "Qwen3OmniMoeForConditionalGeneration",
        _qwen3,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        video="<|vision_start|><|video_pad|><|vision_end|>",
        audio="<|audio_start|><|audio_pad|><|audio_end|>",
    ),
)
