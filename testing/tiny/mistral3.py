# SPDX-License-Identifier: Apache-2.0
"""Small models with a Pixtral tower, of 8 x 8 tokens at most.

Mistral 3 makes a token of 2 x 2 patches, Pixtral, in LLaVA's architecture, of one.
"""

import hashlib
from pathlib import Path
from typing import Any

from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
)

from testing.tiny.llava import BOS, EOS, HEAD_DIM, PAD, build_once, draw_weights
from testing.tiny.words import chat_template, tokenizer_with

PATCH_SIZE = 14
SIDE = 8
IMAGE, BREAK, END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"

_WORDS = Path(__file__).with_name("words.py")
_SOURCE = hashlib.sha256(Path(__file__).read_bytes() + _WORDS.read_bytes()).hexdigest()


def build_mistral3(path: Path) -> Path:
    """Write a Mistral 3 and return its folder."""
    return _build(path, "mistral3", merge=2)


def build_pixtral(path: Path) -> Path:
    """Write a Pixtral and return its folder."""
    return _build(path, "pixtral", merge=1)


def _build(path: Path, kind: str, merge: int) -> Path:
    def write(folder: Path) -> None:
        tokenizer = _tokenizer()
        _model(tokenizer, merge).save_pretrained(folder)
        processor = PixtralProcessor(
            image_processor=PixtralImageProcessor(
                size={"longest_edge": SIDE * merge * PATCH_SIZE},
                patch_size={"height": PATCH_SIZE, "width": PATCH_SIZE},
            ),
            tokenizer=tokenizer,
            patch_size=PATCH_SIZE,
            spatial_merge_size=merge,
            chat_template=tokenizer.chat_template,
        )
        processor.save_pretrained(folder)

    return build_once(path, {"kind": kind, "builder": _SOURCE}, write)


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tokenizer_with(
        {"image_token": IMAGE, "image_break_token": BREAK, "image_end_token": END}
    )
    tokenizer.chat_template = chat_template(IMAGE)
    return tokenizer


def _model(tokenizer: PreTrainedTokenizerFast, merge: int) -> Any:
    settings: dict[str, Any] = {
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 128 // HEAD_DIM,
            "head_dim": HEAD_DIM,
            "image_size": SIDE * merge * PATCH_SIZE,
            "patch_size": PATCH_SIZE,
            "hidden_act": "silu",
        },
        "text_config": {
            "model_type": "mistral",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 128 // HEAD_DIM,
            "num_key_value_heads": 128 // HEAD_DIM,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": 4096,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        },
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE),
        "tie_word_embeddings": False,
    }
    model: Any = (
        Mistral3ForConditionalGeneration(Mistral3Config(**settings, spatial_merge_size=merge))
        if merge > 1
        else LlavaForConditionalGeneration(
            LlavaConfig(**settings, vision_feature_layer=-1, vision_feature_select_strategy="full")
        )
    )
    draw_weights(model, tokenizer, seed=0)
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    return model
