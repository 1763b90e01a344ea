# SPDX-License-Identifier: Apache-2.0
"""Relatives of Mistral 3: LightOnOCR."""

from pathlib import Path

from transformers import Mistral3Config, PixtralProcessor

from small_vlm.checkpoint import HEAD_DIM
from testing.tiny.mistral3 import IMAGE, pixtral_tokenizer, save_processor, vision_settings
from testing.tiny.table.entry import TinyModel
from testing.tiny.words import text_settings, token_id

_MERGE = 2


def _write_lightonocr(folder: Path) -> None:
    tokenizer = pixtral_tokenizer()
    image = token_id(tokenizer, IMAGE)
    # Released with Mistral 3's types of configuration and processor.
    Mistral3Config(
        architectures=["LightOnOCRForConditionalGeneration"],
        spatial_merge_size=_MERGE,
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
    save_processor(PixtralProcessor, tokenizer, _MERGE, folder, scale=_MERGE)


ENTRIES = (TinyModel("LightOnOCRForConditionalGeneration", _write_lightonocr, image=IMAGE),)
