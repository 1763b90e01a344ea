# SPDX-License-Identifier: Apache-2.0
"""Small Qwen3-VL checkpoints with a ChatML template."""

from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from testing.tiny.llava import build_once, draw_weights
from testing.tiny.qwen_vl import CHATML, MARKS, mark_ids
from testing.tiny.words import HIDDEN, rotary, text_settings, tokenizer_for

PATCH, MERGE = 16, 2
UNIT = PATCH * MERGE
"""Pixels along one side of a token."""
VISION: dict[str, Any] = {
    "depth": 3,
    "num_heads": 2,
    "hidden_size": 64,
    "out_hidden_size": HIDDEN,
    "intermediate_size": 128,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
}


def build_qwen3_vl(path: Path) -> Path:
    """Write the checkpoint, unless it exists, and return its folder."""

    def write(folder: Path) -> None:
        tokenizer = tokenizer_for(CHATML, MARKS)
        config = Qwen3VLConfig(
            **mark_ids(tokenizer),
            tie_word_embeddings=False,
            vision_config={**VISION, "deepstack_visual_indexes": [0, 1]},
            text_config=text_settings(
                tokenizer,
                layers=3,
                head_dim=32,
                max_position_embeddings=32768,
                rope_parameters=rotary([6, 5, 5], mrope_interleaved=True),
                tie_word_embeddings=False,
            ),
        )
        save(Qwen3VLForConditionalGeneration(config), tokenizer, folder)

    return build_once(path, {"kind": "qwen3-vl"}, write)


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Draw weights, and write model and processor."""
    draw_weights(model, tokenizer, 0)
    model.save_pretrained(folder)
    save_processor(tokenizer, folder)


def save_processor(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write processor and tokenizer."""
    size = {"shortest_edge": UNIT**2, "longest_edge": 64 * UNIT**2}
    # One normalisation for both, as released: vLLM normalises images and videos in one place.
    mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    grid = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGE, **mean}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**grid, size=size),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**grid, size={**size, "longest_edge": 512 * UNIT**2}),
        chat_template=CHATML,
    ).save_pretrained(folder)
