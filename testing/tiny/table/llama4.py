# SPDX-License-Identifier: Apache-2.0
"""Llama 4: tiles of 112 px with separators, a dense layer and one with experts."""

from pathlib import Path
from typing import Final

from transformers import Llama4Config, Llama4ImageProcessor, Llama4Processor

from testing.tiny.table.entry import TinyModel
from testing.tiny.table.parts import TOWER, save, text
from testing.tiny.words import HIDDEN, chat_template, token_id, tokenizer_for

TILE: Final = 112
PATCH: Final = 14
START, END, IMAGE = "<|image_start|>", "<|image_end|>", "<|image|>"
MARKS: Final = (
    *(START, END, IMAGE),
    *("<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
)


def _llama4(folder: Path) -> None:
    tokenizer = tokenizer_for(chat_template(IMAGE), MARKS)
    processor = Llama4Processor(
        Llama4ImageProcessor(size={"height": TILE, "width": TILE}, max_patches=4),
        tokenizer,
        patch_size=PATCH,
        chat_template=tokenizer.chat_template,
    )
    width = TOWER["hidden_size"]
    config = Llama4Config(
        vision_config={
            **TOWER,
            "intermediate_size": 4 * width,  # as wide as four patches that become one
            "vision_output_dim": width,
            "projector_input_dim": width,
            "projector_output_dim": width,
            "image_size": TILE,
            "patch_size": PATCH,
        },
        text_config=text(
            tokenizer,
            intermediate_size_mlp=2 * HIDDEN,
            head_dim=32,
            num_local_experts=4,
            interleave_moe_layer_step=2,
        ),
        boi_token_index=token_id(tokenizer, START),
        eoi_token_index=token_id(tokenizer, END),
        image_token_index=token_id(tokenizer, "<|patch|>"),
        tie_word_embeddings=False,
    )
    save(folder, "Llama4ForConditionalGeneration", config, processor)


ENTRIES: Final = (TinyModel("Llama4ForConditionalGeneration", _llama4, image=IMAGE),)
