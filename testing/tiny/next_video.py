# SPDX-License-Identifier: Apache-2.0
"""A small LLaVA-NeXT-Video: CLIP tower of 8 x 8 patches, pooled to 4 x 4 a frame."""

from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlavaNextImageProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
)

from small_vlm.checkpoint import CHAT_TEMPLATE, HEAD_DIM, IMAGE, PIXEL_MEAN, PIXEL_STD
from testing.tiny.llava import build_once, save, text_config, train_tokenizer
from testing.tiny.words import token_id

FRAME = 64  # vLLM's pooler divides by image size over squared patch size, which must not be 0
SIDE = 8
"""Patches along one side of a frame."""
FRAME_TOKENS = 16
VIDEO_TOKEN = "<video>"
_HIDDEN = 64


def build_next_video(path: Path) -> Path:
    """Write the checkpoint, unless it is there, and return its folder."""

    def write(folder: Path) -> None:
        tokenizer = train_tokenizer(1024)
        tokenizer.add_special_tokens({"additional_special_tokens": [VIDEO_TOKEN]})
        config = LlavaNextVideoConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=_HIDDEN,
                intermediate_size=2 * _HIDDEN,
                num_hidden_layers=3,
                num_attention_heads=_HIDDEN // HEAD_DIM,
                image_size=FRAME,
                patch_size=FRAME // SIDE,
                projection_dim=_HIDDEN,
            ),
            text_config=text_config(tokenizer, _HIDDEN, 2, 8192),
            image_token_index=IMAGE,
            video_token_index=token_id(tokenizer, VIDEO_TOKEN),
            image_grid_pinpoints=[[FRAME, FRAME]],
            image_seq_length=SIDE * SIDE,
            video_seq_length=FRAME_TOKENS,
        )
        save(LlavaNextVideoForConditionalGeneration(config), tokenizer, folder, 0, "float32")
        pixels: dict[str, Any] = {
            "size": {"shortest_edge": FRAME},
            "crop_size": {"height": FRAME, "width": FRAME},
            "image_mean": PIXEL_MEAN["clip"],
            "image_std": PIXEL_STD["clip"],
        }
        LlavaNextVideoProcessor(
            video_processor=LlavaNextVideoVideoProcessor(**pixels),
            image_processor=LlavaNextImageProcessor(
                **pixels, image_grid_pinpoints=config.image_grid_pinpoints
            ),
            tokenizer=tokenizer,
            patch_size=FRAME // SIDE,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            video_token=VIDEO_TOKEN,
            chat_template=CHAT_TEMPLATE,
        ).save_pretrained(folder)

    return build_once(path, {"kind": "llava-next-video"}, write)
