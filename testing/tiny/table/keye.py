# SPDX-License-Identifier: Apache-2.0
"""Keye-VL and Keye-VL 1.5: a SigLIP of any size, patches merged two by two, a Qwen3."""

from functools import partial
from pathlib import Path
from typing import Any, Final

from testing.tiny.table.entry import TinyModel
from testing.tiny.table.folder import (
    HIDDEN,
    save_marked,
    text_fields,
    vision_fields,
    write_config,
    write_configuration,
    write_processor,
)
from testing.tiny.words import token_id

_MARKS: Final = (
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    *("<|frame|>", "<|fast_start|>", "<|fast_end|>"),
)


def _write(architecture: str, model_type: str, folder: Path) -> None:
    tokenizer = save_marked(folder, *_MARKS)
    vision: dict[str, Any] = vision_fields(
        image_size=112,
        patch_size=14,
        num_channels=3,
        spatial_merge_size=2,
        layer_norm_eps=1e-6,
        hidden_act="gelu_pytorch_tanh",
        attention_dropout=0.0,
    )
    named = write_configuration(
        folder, model_type, {"vision_config": "PretrainedConfig"}, base="Qwen3Config"
    )
    marks = {
        "image_token_id": token_id(tokenizer, "<|image_pad|>"),
        "video_token_id": token_id(tokenizer, "<|video_pad|>"),
        "vision_start_token_id": token_id(tokenizer, "<|vision_start|>"),
        "vision_end_token_id": token_id(tokenizer, "<|vision_end|>"),
    }
    language = text_fields(
        tokenizer,
        head_dim=HIDDEN // 2,
        rope_scaling={"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]},
        rope_theta=10_000.0,
    )
    write_config(folder, architecture, {**language, **named, **marks, "vision_config": vision})
    write_processor(folder, "PatchProcessor")


def _entry(architecture: str, model_type: str) -> TinyModel:
    return TinyModel(
        architecture=architecture,
        write=partial(_write, architecture, model_type),
        image="<|vision_start|><|image_pad|><|vision_end|>",
        video="<|vision_start|><|video_pad|><|vision_end|>",
        engine={"trust_remote_code": True},
    )


ENTRIES: Final = [
    _entry("KeyeForConditionalGeneration", "Keye"),
    _entry("KeyeVL1_5ForConditionalGeneration", "KeyeVL1_5"),
]
