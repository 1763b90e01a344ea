# SPDX-License-Identifier: Apache-2.0
"""Small Qwen2-VL and Qwen2.5-VL checkpoints with a ChatML template."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from testing.tiny.llava import build_once, draw_weights
from testing.tiny.words import HIDDEN, rotary, text_settings, token_id, tokenizer_for

Version = Literal["2", "2.5"]

PATCH, MERGE = 14, 2
UNIT = PATCH * MERGE
"""Pixels along one side of a token."""
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
START, END = "<|vision_start|>", "<|vision_end|>"
TURN, OVER = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = (TURN, OVER, START, END, "<|vision_pad|>", IMAGE, VIDEO)


def build_qwen_vl(
    path: Path,
    version: Version,
    *,
    layers: int = 2,
    full: Sequence[int] = (1,),
    window: int = 2 * UNIT,
    side: int = 8 * UNIT,
) -> Path:
    """Write the checkpoint, unless it exists, and return its folder.

    Args:
        path: of the folder.
        version: of the family.
        layers: of the tower.
        full: 2.5 only: the layers that attend over the whole image; the others do so in windows.
        window: 2.5 only: pixels along one side of a window.
        side: pixels along one side of the largest square image that is not scaled down.

    """
    asked = {name: value for name, value in locals().items() if name != "path"}

    def write(folder: Path) -> None:
        tokenizer = tokenizer_for(CHATML, MARKS)
        vision: dict[str, Any] = {
            "depth": layers,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
        }
        if version == "2":
            vision |= {"embed_dim": 64, "hidden_size": HIDDEN, "mlp_ratio": 2}
        else:
            vision |= {
                "hidden_size": 64,
                "out_hidden_size": HIDDEN,
                "intermediate_size": 128,
                "window_size": window,
                "fullatt_block_indexes": list(full),
                "tokens_per_second": 2,
            }
        settings: dict[str, Any] = {
            "text_config": text_settings(
                tokenizer,
                layers=3,
                max_position_embeddings=32768,
                rope_parameters=rotary([4, 6, 6]),
                tie_word_embeddings=False,
            ),
            "vision_config": vision,
            "tie_word_embeddings": False,
            **mark_ids(tokenizer),
        }
        model: Any = (
            Qwen2VLForConditionalGeneration(Qwen2VLConfig(**settings))
            if version == "2"
            else Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**settings))
        )
        draw_weights(model, tokenizer, 0)
        model.save_pretrained(folder)
        size = {"shortest_edge": UNIT**2, "longest_edge": side**2}
        grid = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGE, "size": size}
        (Qwen2VLProcessor if version == "2" else Qwen2_5_VLProcessor)(
            image_processor=Qwen2VLImageProcessor(**grid),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(**grid),
            chat_template=CHATML,
        ).save_pretrained(folder)

    return build_once(path, {"kind": "qwen-vl", "layers": 3, **asked, "full": list(full)}, write)


def mark_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the special tokens' ids by their names in a configuration."""
    return {
        "image_token_id": token_id(tokenizer, IMAGE),
        "video_token_id": token_id(tokenizer, VIDEO),
        "vision_start_token_id": token_id(tokenizer, START),
        "vision_end_token_id": token_id(tokenizer, END),
    }
