# SPDX-License-Identifier: Apache-2.0
"""A small LLaVA-OneVision: SigLIP tower of 8 x 8 patches, up to 4 x 4 tiles, images and videos."""

from pathlib import Path
from typing import Any

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    SiglipVisionConfig,
)

from small_vlm.checkpoint import CHAT_TEMPLATE, HEAD_DIM, IMAGE, PIXEL_MEAN, PIXEL_STD
from testing.tiny.llava import build_once, save, text_config, train_tokenizer
from testing.tiny.words import token_id

CROP = 112
SIDE = 8
"""Patches along one side of a crop or a frame."""
FRAME_TOKENS = 16
"""Of a frame, after pooling by two in both directions."""
VIDEO_TOKEN = "<video>"
_IMAGES = "{%- if part['type'] in ('image', 'image_url') -%}"
_TEMPLATE = CHAT_TEMPLATE.replace(
    _IMAGES,
    "{%- if part['type'] in ('video', 'video_url') -%}{{ '<video>\\n' }}{%- endif -%}" + _IMAGES,
)
_HIDDEN = 64


def build_onevision(path: Path) -> Path:
    """Write the checkpoint, unless it is there, and return its folder."""

    def write(folder: Path) -> None:
        tokenizer = train_tokenizer(1024)
        tokenizer.chat_template = _TEMPLATE
        tokenizer.add_special_tokens({"additional_special_tokens": [VIDEO_TOKEN]})
        grid = [[CROP * high, CROP * wide] for high in range(1, 5) for wide in range(1, 5)]
        config = LlavaOnevisionConfig(
            vision_config=siglip(
                CROP,
                CROP // SIDE,
                hidden=_HIDDEN,
                mlp=2 * _HIDDEN,
                layers=2,
                heads=_HIDDEN // HEAD_DIM,
            ),
            text_config=text_config(tokenizer, _HIDDEN, 2, 8192),
            image_token_index=IMAGE,
            video_token_index=token_id(tokenizer, VIDEO_TOKEN),
            image_grid_pinpoints=grid,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
        save(LlavaOnevisionForConditionalGeneration(config), tokenizer, folder, 0, "float32")
        pixels = {
            "size": {"height": CROP, "width": CROP},
            "image_mean": PIXEL_MEAN["siglip"],
            "image_std": PIXEL_STD["siglip"],
        }
        LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessor(**pixels, image_grid_pinpoints=grid),
            tokenizer=tokenizer,
            video_processor=LlavaOnevisionVideoProcessor(**pixels),
            num_image_tokens=SIDE * SIDE,
            vision_feature_select_strategy="full",
            video_token=VIDEO_TOKEN,
            chat_template=_TEMPLATE,
        ).save_pretrained(folder)

    return build_once(path, {"kind": "llava-onevision"}, write)


def siglip(
    side: int, patch: int, *, hidden: int, mlp: int, layers: int, heads: int
) -> SiglipVisionConfig:
    """Return the configuration of a SigLIP tower without its pooling head.

    Args:
        side: of an image, in pixels.
        patch: side of a patch, in pixels.
        hidden: width.
        mlp: width of the MLP.
        layers: how many.
        heads: of the attention.

    """
    settings: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": side,
        "patch_size": patch,
        "vision_use_head": False,
    }
    return SiglipVisionConfig(**settings)
