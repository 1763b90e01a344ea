# SPDX-License-Identifier: Apache-2.0
"""A small Video-LLaVA with the public model's numbers of tokens: 16 x 16 patches a frame."""

from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
    VideoLlavaVideoProcessor,
)

from small_vlm.checkpoint import CHAT_TEMPLATE, HEAD_DIM, IMAGE
from testing.tiny.llava import build_once, save, text_config, train_tokenizer
from testing.tiny.words import token_id

FRAMES = 8
SIDE = 16
"""Patches along one side of a frame."""
PATCHES = SIDE * SIDE
FRAME_TOKENS = 1 + PATCHES
VIDEO_TOKEN = "<video>"
_HIDDEN = 64
_PIXELS = 64


def build_video_llava(path: Path) -> Path:
    """Write the checkpoint, unless it is there, and return its folder."""

    def write(folder: Path) -> None:
        tokenizer = train_tokenizer(1024)
        tokenizer.add_special_tokens({"additional_special_tokens": [VIDEO_TOKEN]})
        config = VideoLlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=_HIDDEN,
                intermediate_size=2 * _HIDDEN,
                num_hidden_layers=3,
                num_attention_heads=_HIDDEN // HEAD_DIM,
                image_size=_PIXELS,
                patch_size=_PIXELS // SIDE,
                projection_dim=_HIDDEN,
            ),
            text_config=text_config(tokenizer, _HIDDEN, 2, 8192),
            image_token_index=IMAGE,
            video_token_index=token_id(tokenizer, VIDEO_TOKEN),
            image_seq_length=PATCHES,
            video_seq_length=FRAMES * FRAME_TOKENS,
        )
        save(VideoLlavaForConditionalGeneration(config), tokenizer, folder, 0, "float32")
        pixels: dict[str, Any] = {
            "size": {"shortest_edge": _PIXELS},
            "crop_size": {"height": _PIXELS, "width": _PIXELS},
        }
        video = "{%- if part['type'] in ('video', 'video_url') -%}{{ '<video>\\n' }}{%- endif -%}"
        loop = "{%- for part in message['content'] -%}"
        VideoLlavaProcessor(
            image_processor=VideoLlavaImageProcessor(**pixels),
            video_processor=VideoLlavaVideoProcessor(**pixels),
            tokenizer=tokenizer,
            patch_size=_PIXELS // SIDE,
            chat_template=CHAT_TEMPLATE.replace(loop, loop + video, 1),
        ).save_pretrained(folder)

    return build_once(path, {"kind": "video-llava"}, write)
