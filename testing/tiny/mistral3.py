# SPDX-License-Identifier: Apache-2.0
"""Small models with a Pixtral tower, of 8 x 8 tokens at most.

Mistral 3 makes a token of 2 x 2 patches, Pixtral, in LLaVA's architecture, of one.
"""

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

from small_vlm.checkpoint import HEAD_DIM
from testing.tiny.llava import build_once, draw_weights
from testing.tiny.words import (
    HEADS,
    HIDDEN,
    chat_template,
    text_settings,
    token_id,
    tokenizer_with,
)

PATCH_SIZE = 14
SIDE = 8
IMAGE, BREAK, END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"


def build_mistral3(path: Path) -> Path:
    """Write a Mistral 3 and return its folder."""
    return _build(path, "mistral3", merge=2)


def build_pixtral(path: Path) -> Path:
    """Write a Pixtral and return its folder."""
    return _build(path, "pixtral", merge=1)


def _build(path: Path, kind: str, merge: int) -> Path:
    def write(folder: Path) -> None:
        tokenizer = pixtral_tokenizer()
        _model(tokenizer, merge).save_pretrained(folder)
        save_processor(PixtralProcessor, tokenizer, merge, folder)

    return build_once(path, {"kind": kind}, write)


def save_processor(
    processor: Any, tokenizer: PreTrainedTokenizerFast, merge: int, folder: Path, scale: int = 1
) -> None:
    """Write a processor of the given class, and the tokenizer.

    Args:
        processor: the class.
        tokenizer: from `pixtral_tokenizer`.
        merge: patches along one side of a token.
        folder: of the model.
        scale: patches along one side of what an image's size is rounded to.

    """
    patch = scale * PATCH_SIZE
    processor(
        image_processor=PixtralImageProcessor(
            size={"longest_edge": SIDE * merge * PATCH_SIZE},
            patch_size={"height": patch, "width": patch},
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        spatial_merge_size=merge,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)


def pixtral_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with Pixtral's marks."""
    tokenizer = tokenizer_with(
        {"image_token": IMAGE, "image_break_token": BREAK, "image_end_token": END}
    )
    tokenizer.chat_template = chat_template(IMAGE)
    return tokenizer


def vision_settings(merge: int) -> dict[str, Any]:
    """Return the configuration of a tower for images of 8 x 8 tokens at most."""
    return {
        "model_type": "pixtral",
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "head_dim": HEAD_DIM,
        "image_size": SIDE * merge * PATCH_SIZE,
        "patch_size": PATCH_SIZE,
        "hidden_act": "silu",
    }


def _model(tokenizer: PreTrainedTokenizerFast, merge: int) -> Any:
    settings: dict[str, Any] = {
        "vision_config": vision_settings(merge),
        "text_config": text_settings(
            tokenizer,
            layers=3,
            model_type="mistral",
            head_dim=HEAD_DIM,
            max_position_embeddings=4096,
            sliding_window=None,
            tie_word_embeddings=False,
            rms_norm_eps=1e-5,
        ),
        "image_token_index": token_id(tokenizer, IMAGE),
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
    return model
