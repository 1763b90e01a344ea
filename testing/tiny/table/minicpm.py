# SPDX-License-Identifier: Apache-2.0
"""MiniCPM-V 4.5, of which a checkpoint brings the code, and 4.6, which Transformers has."""

from pathlib import Path
from typing import Any, Final

from transformers import (
    MiniCPMV4_6Config,
    MiniCPMV4_6ImageProcessor,
    MiniCPMV4_6Processor,
    MiniCPMV4_6VideoProcessor,
)

from testing.tiny.table.entry import TinyModel
from testing.tiny.table.parts import (
    TOWER,
    copy_code,
    save,
    text,
    write_config,
    write_json,
)
from testing.tiny.words import chat_template, rotary, token_id, tokenizer_for, tokenizer_with

SIDE: Final = 224
PATCH: Final = 14
SLICES: Final = 4
QUERIES: Final = 16
SIZE: Final = (2 * SIDE, 3 * SIDE // 2)
BRACKETS: Final = {
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
MARKS_4_6: Final = {**BRACKETS, "image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
IMAGE, VIDEO = "(<image>./</image>)", "(<video>./</video>)"


def _minicpmv(folder: Path) -> None:
    marks = (*BRACKETS.values(), "<video>", "</video>")
    tokenizer = tokenizer_for(chat_template(IMAGE, VIDEO), marks)
    config = {
        **text(tokenizer, head_dim=32),
        "model_type": "minicpmv",
        "version": 4.5,
        "auto_map": {"AutoConfig": "minicpmv_config.MiniCPMVConfig"},
        "vision_config": {**TOWER, "image_size": SIDE, "patch_size": PATCH},
        "image_size": SIDE,
        "max_slice_num": SLICES,
        "query_num": QUERIES,
        "drop_vision_last_layer": False,
    }
    write_config(folder, "MiniCPMV", config)
    tokenizer.save_pretrained(folder)
    copy_code(folder, "base", "minicpmv", "minicpmv_config")
    write_json(folder / "processor_config.json", {"processor_class": "MiniCPMVProcessor"})
    write_json(
        folder / "preprocessor_config.json",
        {
            "auto_map": {"AutoImageProcessor": "minicpmv.MiniCPMVImageProcessor"},
            "image_processor_type": "MiniCPMVImageProcessor",
            "max_slice_nums": SLICES,
            "scale_resolution": SIDE,
            "patch_size": PATCH,
            "image_feature_size": QUERIES,
        },
    )


def _minicpmv4_6(folder: Path) -> None:
    tokenizer = tokenizer_with(MARKS_4_6)
    cut = {"scale_resolution": SIDE, "patch_size": PATCH, "max_slice_nums": SLICES}
    processor = MiniCPMV4_6Processor(
        MiniCPMV4_6ImageProcessor(**cut), MiniCPMV4_6VideoProcessor(**cut), tokenizer
    )
    kind: Any = MiniCPMV4_6Config
    config = kind(
        vision_config={**TOWER, "image_size": SIDE, "patch_size": PATCH},
        text_config=text(
            tokenizer,
            model_type="qwen3_5_text",
            layer_types=["linear_attention", "full_attention"],
            head_dim=32,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            linear_num_key_heads=1,
            linear_num_value_heads=2,
            rope_parameters=rotary([3, 3, 2], partial_rotary_factor=0.5, mrope_interleaved=True),
        ),
        insert_layer_id=0,
        image_size=SIDE,
        max_slice_nums=SLICES,
        image_token_id=token_id(tokenizer, MARKS_4_6["image_token"]),
        video_token_id=token_id(tokenizer, MARKS_4_6["video_token"]),
    )
    save(folder, "MiniCPMV4_6ForConditionalGeneration", config, processor)


ENTRIES: Final = (
    TinyModel(
        "MiniCPMV",
        _minicpmv,
        image=IMAGE,
        video=VIDEO,
        size=SIZE,
        engine={"trust_remote_code": True},
    ),
    TinyModel(
        "MiniCPMV4_6ForConditionalGeneration",
        _minicpmv4_6,
        image=MARKS_4_6["image_token"],
        video=MARKS_4_6["video_token"],
        size=SIZE,
        engine={"dtype": "bfloat16"},  # vLLM's linear attention on a CPU has no other
    ),
)
