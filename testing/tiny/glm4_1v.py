# SPDX-License-Identifier: Apache-2.0
"""A small GLM-4.1V checkpoint with GLM's marks and template."""

from pathlib import Path
from typing import Any

from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    PreTrainedTokenizerFast,
)

from testing.tiny.llava import build_once, draw_weights
from testing.tiny.words import HIDDEN, rotary, text_settings, token_id, tokenizer_for

PATCH, MERGE = 14, 2
UNIT = PATCH * MERGE
"""Pixels along one side of a token."""
IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
VIDEO = "<|begin_of_video|><|video|><|end_of_video|>"
TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    f"{{% if part['type'] == 'image' %}}{IMAGE}"
    f"{{% elif part['type'] == 'video' %}}{VIDEO}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VISION: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "hidden_size": 64,
    "out_hidden_size": HIDDEN,
    "intermediate_size": 128,
    "image_size": 8 * PATCH,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
}
_MARKS = {
    "image_start_token_id": "<|begin_of_image|>",
    "image_token_id": "<|image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_token_id": "<|video|>",
    "video_end_token_id": "<|end_of_video|>",
}
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


def build_glm4_1v(path: Path) -> Path:
    """Write the checkpoint, unless it exists, and return its folder."""

    def write(folder: Path) -> None:
        tokenizer, ids = glm_tokenizer()
        config = Glm4vConfig(
            **ids,
            tie_word_embeddings=False,
            vision_config=VISION,
            text_config=text_settings(
                tokenizer,
                layers=3,
                max_position_embeddings=32768,
                rope_parameters=rotary([2, 3, 3], partial_rotary_factor=0.5),
            ),
        )
        model = Glm4vForConditionalGeneration(config)
        draw_weights(model, tokenizer, 0)
        model.save_pretrained(folder)
        save_processor(Glm4vProcessor, Glm4vImageProcessor, Glm4vVideoProcessor, tokenizer, folder)

    return build_once(path, {"kind": "glm4.1v", "layers": 3}, write)


def glm_tokenizer() -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    """Return a tokenizer with GLM's marks, and their ids by their names in a configuration."""
    tokenizer = tokenizer_for(TEMPLATE, ("[gMASK]", "<sop>", *_ROLES, *_MARKS.values()))
    return tokenizer, {name: token_id(tokenizer, mark) for name, mark in _MARKS.items()}


def save_processor(
    processor: Any, image: Any, video: Any, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write a processor of the given classes, and the tokenizer."""
    # An image counts as two frames here.
    size = {"shortest_edge": 2 * 4 * UNIT**2, "longest_edge": 2 * 64 * UNIT**2}
    grid = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGE, "size": size}
    processor(
        image_processor=image(**grid),
        tokenizer=tokenizer,
        video_processor=video(**grid),
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
