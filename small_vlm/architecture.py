# SPDX-License-Identifier: Apache-2.0
"""The small VLM's parts: a LLaVA of `transformers`, its tokenizer and its processor."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from small_vlm.checkpoint import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    HEAD_DIM,
    IMAGE,
    PAD,
    PIXEL_MEAN,
    PIXEL_STD,
    SPECIAL_TOKENS,
    UNK,
)
from small_vlm.language import WORDS
from small_vlm.scenes import IMAGE_SIZE, PATCH, SIDE, Pixels

VISION_WIDTH: Final = 128
VISION_LAYERS: Final = 5  # Features leave the fourth; the fifth serves CLS alone.
WIDTH: Final = 128
LAYERS: Final = 4
VISUAL_TOKENS: Final = SIDE * SIDE


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word of the drawn world, whatever the case."""
    vocabulary = {
        word: index for index, word in enumerate(dict.fromkeys((*SPECIAL_TOKENS, *WORDS)))
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS[UNK]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=SPECIAL_TOKENS[UNK],
        bos_token=SPECIAL_TOKENS[BOS],
        eos_token=SPECIAL_TOKENS[EOS],
        pad_token=SPECIAL_TOKENS[PAD],
        extra_special_tokens={"image_token": SPECIAL_TOKENS[IMAGE]},
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Build the processor of images and text."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_mean=PIXEL_MEAN["clip"],
            image_std=PIXEL_STD["clip"],
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, *, layers: int = LAYERS, width: int = WIDTH
) -> LlavaForConditionalGeneration:
    """Build the untrained model, float32, with a language model of some depth and width."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=VISION_WIDTH,
            intermediate_size=4 * VISION_WIDTH,
            num_hidden_layers=VISION_LAYERS,
            num_attention_heads=VISION_WIDTH // HEAD_DIM,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
            projection_dim=VISION_WIDTH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // HEAD_DIM,
            num_key_value_heads=width // HEAD_DIM,
            head_dim=HEAD_DIM,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        ),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def normalized(pictures: list[Pixels]) -> Tensor:
    """Return ``(B, 3, H, W)`` float32 as the processor would, for pictures of equal size."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor(PIXEL_MEAN["clip"]).view(1, 3, 1, 1)
    std = torch.tensor(PIXEL_STD["clip"]).view(1, 3, 1, 1)
    return (pixels - mean) / std


def parts_of(model: Any) -> dict[str, Any]:
    """Return the parts that are trained: tower, projector, language model."""
    return {
        "tower": tower_of(model),
        "projector": model.model.multi_modal_projector,
        "language": model.model.language_model,
    }


def tower_of(model: Any) -> Any:
    """Return the CLIP transformer inside a LLaVA, whatever Transformers calls the layers above."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)
