# SPDX-License-Identifier: Apache-2.0
"""A small Qwen3.5 checkpoint: Qwen3-VL's tower before a hybrid of linear and full attention."""

from pathlib import Path

from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from testing.tiny.llava import build_once
from testing.tiny.qwen3_vl import VISION, save
from testing.tiny.qwen_vl import CHATML, MARKS, mark_ids
from testing.tiny.words import rotary, text_settings, tokenizer_for


def build_qwen3_5(path: Path) -> Path:
    """Write the checkpoint, unless it exists, and return its folder."""

    def write(folder: Path) -> None:
        tokenizer = tokenizer_for(CHATML, MARKS)
        config = Qwen3_5Config(
            **mark_ids(tokenizer),
            tie_word_embeddings=False,
            vision_config=VISION,
            text_config=text_settings(
                tokenizer,
                layers=3,
                layer_types=["linear_attention", "full_attention", "full_attention"],
                head_dim=32,
                linear_key_head_dim=128,
                linear_value_head_dim=128,
                linear_num_key_heads=1,
                linear_num_value_heads=2,
                max_position_embeddings=32768,
                rope_parameters=rotary(
                    [3, 3, 2], partial_rotary_factor=0.5, mrope_interleaved=True
                ),
                tie_word_embeddings=False,
            ),
        )
        save(Qwen3_5ForConditionalGeneration(config), tokenizer, folder)

    return build_once(path, {"kind": "qwen3.5"}, write)
