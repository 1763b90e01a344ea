# SPDX-License-Identifier: Apache-2.0
"""Idefics 3 and SmolVLM: tiles of 112 px with their row and column as text, 16 tokens each."""

from pathlib import Path
from typing import Any, Final

from transformers import (
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from testing.tiny.table.entry import TinyModel
from testing.tiny.table.parts import TOWER, save, text
from testing.tiny.words import chat_template, token_id, tokenizer_for

TILE: Final = 112
PATCH: Final = 14
MERGE: Final = 2
ROWS: Final = 4
TOKENS: Final = (TILE // PATCH // MERGE) ** 2
MARKS: Final = (
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, ROWS + 1) for column in range(1, ROWS + 1)),
)
SIZES: Final[dict[str, Any]] = {
    "size": {"longest_edge": 2 * TILE},
    "max_image_size": {"longest_edge": TILE},
}


def _config(kind: Any, tokenizer: Any) -> Any:
    return kind(
        vision_config={**TOWER, "image_size": TILE, "patch_size": PATCH},
        text_config=text(tokenizer, model_type="llama"),
        image_token_id=token_id(tokenizer, "<image>"),
        scale_factor=MERGE,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )


def _idefics3(folder: Path) -> None:
    tokenizer = tokenizer_for(chat_template("<image>"), MARKS)
    processor = Idefics3Processor(
        Idefics3ImageProcessor(**SIZES),
        tokenizer,
        image_seq_len=TOKENS,
        chat_template=tokenizer.chat_template,
    )
    config = _config(Idefics3Config, tokenizer)
    save(folder, "Idefics3ForConditionalGeneration", config, processor)


def _smolvlm(folder: Path) -> None:
    tokenizer = tokenizer_for(chat_template("<image>"), MARKS)
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**SIZES),
        tokenizer,
        SmolVLMVideoProcessor(**SIZES),
        image_seq_len=TOKENS,
        chat_template=tokenizer.chat_template,
    )
    config = _config(SmolVLMConfig, tokenizer)
    save(folder, "SmolVLMForConditionalGeneration", config, processor)


ENTRIES: Final = (
    TinyModel("Idefics3ForConditionalGeneration", _idefics3, image="<image>"),
    TinyModel("SmolVLMForConditionalGeneration", _smolvlm, image="<image>"),
)
