# SPDX-License-Identifier: Apache-2.0
"""The shape of LLaVA-OneVision-Qwen2-7B without weights, or a small one of the same build."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
)

from small_vlm.checkpoint import CHAT_TEMPLATE, EOS, HEAD_DIM, IMAGE, PAD, PIXEL_MEAN, PIXEL_STD
from testing.tiny.llava import build_once, save, text_config, train_tokenizer
from testing.tiny.onevision import siglip
from testing.tiny.words import token_id

SIDE: Final = 384
PATCH: Final = 14
FRAME_TOKENS: Final = 196
"""27 x 27 patches, pooled to 14 x 14."""
VIDEO: Final = "<video>"
GRID: Final = [[SIDE * high, SIDE * wide] for high in range(1, 7) for wide in range(1, 7)]


def write_onevision(path: Path, *, tiny: bool) -> Path:
    """Write the checkpoint and return its folder; a tiny one has weights.

    The vocabulary is the small one of the tests, so the head is smaller than the published
    model's; a prompt's prefill uses it for one token.
    """
    tokenizer = train_tokenizer(1024)
    tokenizer.add_special_tokens({"additional_special_tokens": [VIDEO]})
    vision = siglip(
        SIDE,
        PATCH,
        hidden=64 if tiny else 1152,
        mlp=128 if tiny else 4304,
        layers=2 if tiny else 26,
        heads=64 // HEAD_DIM if tiny else 16,
    )
    text = (
        text_config(tokenizer, 64, 2, 32768)
        if tiny
        else Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            max_position_embeddings=32768,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        video_token_index=token_id(tokenizer, VIDEO),
        image_grid_pinpoints=GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        architectures=[LlavaOnevisionForConditionalGeneration.__name__],
    )

    def write(folder: Path) -> None:
        if tiny:
            model = LlavaOnevisionForConditionalGeneration(config)
            save(model, tokenizer, folder, 0, "float32")
        else:
            config.save_pretrained(folder)
        pixels = {
            "size": {"height": SIDE, "width": SIDE},
            "image_mean": PIXEL_MEAN["siglip"],
            "image_std": PIXEL_STD["siglip"],
        }
        LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessor(**pixels, image_grid_pinpoints=GRID),
            tokenizer=tokenizer,
            video_processor=LlavaOnevisionVideoProcessor(**pixels),
            num_image_tokens=(SIDE // PATCH) ** 2,
            vision_feature_select_strategy="full",
            video_token=VIDEO,
            chat_template=CHAT_TEMPLATE,
        ).save_pretrained(folder)

    source = Path(__file__).read_text()
    return build_once(
        path,
        {"kind": "onevision", "tiny": tiny, "source": source, "torch": torch.__version__},
        write,
    )
