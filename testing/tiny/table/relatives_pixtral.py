# SPDX-License-Identifier: Apache-2.0
"""Relatives of Mistral 3: LightOnOCR."""

from pathlib import Path
from typing import Any

from transformers import LightOnOcrConfig, LightOnOcrProcessor

from small_vlm.checkpoint import HEAD_DIM
from testing.tiny.mistral3 import IMAGE, pixtral_tokenizer, save_processor, vision_settings
from testing.tiny.table.entry import TinyModel
from testing.tiny.words import text_settings, token_id

_MERGE = 2


def _write_lightonocr(folder: Path) -> None:
    tokenizer = pixtral_tokenizer()
    image = token_id(tokenizer, IMAGE)
    config: Any = LightOnOcrConfig
    config(
        architectures=["LightOnOCRForConditionalGeneration"],
        spatial_merge_size=_MERGE,
        image_token_id=image,
        # Fields of released checkpoints that Transformers does not know; vLLM reads them.
        image_token_index=image,
        projector_hidden_act="gelu",
        multimodal_projector_bias=False,
        tie_word_embeddings=False,
        vision_config=vision_settings(_MERGE),
        text_config=text_settings(
            tokenizer,
            layers=2,
            model_type="qwen3",
            head_dim=HEAD_DIM,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
        ),
    ).save_pretrained(folder)
    save_processor(LightOnOcrProcessor, tokenizer, _MERGE, folder, scale=_MERGE)


ENTRIES = (TinyModel("LightOnOCRForConditionalGeneration", _write_lightonocr, image=IMAGE),)
