# SPDX-License-Identifier: Apache-2.0
"""Phi-3-Vision, whose tower is CLIP-L cut to two layers, and Phi-4-Vision with SigLIP 2."""

import json
from pathlib import Path
from typing import Final

from testing.tiny.table.entry import TinyModel
from testing.tiny.table.parts import (
    LAYERS,
    TOWER,
    copy_code,
    text,
    with_code,
    write_config,
    write_json,
)
from testing.tiny.words import chat_template, tokenizer_for

IMAGE_3: Final = "<|image_1|>"
VOCABULARY_3: Final = 32_064
"""vLLM's code has 32044 as the id of an image token."""
CLIP_LAYERS: Final = 24
IMAGE_4: Final = "<image>"
DUMMY_4: Final = 100_256
"""vLLM's code has this id for an image token; the tokenizer must know it, the model need not."""


def _phi3v(folder: Path) -> None:
    tokenizer = tokenizer_for(chat_template(IMAGE_3), (IMAGE_3, "<|image|>"))
    config = {
        **text(tokenizer, vocab_size=VOCABULARY_3),
        "model_type": "phi3_v",
        "auto_map": {"AutoConfig": "language_config.Phi3VConfig"},
        "img_processor": {
            "name": "clip_vision_model",
            "image_dim_out": 1024,
            "num_img_tokens": 144,
            "layer_idx": LAYERS - CLIP_LAYERS - 1,
        },
        "embd_layer": {
            "use_hd_transform": True,
            "with_learnable_separator": True,
            "hd_transform_order": "sub_glb",
        },
    }
    write_config(folder, "Phi3VForCausalLM", config)
    with_code(folder, tokenizer, "phi", "Phi3VProcessor")
    copy_code(folder, "language_config")


def _phi4v(folder: Path) -> None:
    tokenizer = tokenizer_for(chat_template(IMAGE_4), (IMAGE_4,))
    config = {
        **text(tokenizer),
        "model_type": "phi4-siglip",
        "auto_map": {"AutoConfig": "language_config.Phi4VConfig"},
        "mm_hidden_size": TOWER["hidden_size"],
        "max_num_patches": 64,
        "min_num_patches": 16,
        "vision_config": {
            **TOWER,
            "num_hidden_layers": LAYERS + 1,  # the last is not used
            "patch_size": 16,
            "num_patches": 64,
        },
    }
    write_config(folder, "Phi4ForCausalLMV", config)
    with_code(folder, tokenizer, "phi", "Phi4VProcessor")
    file = folder / "tokenizer.json"
    words = json.loads(file.read_text())
    words["model"]["vocab"]["<|dummy_0|>"] = DUMMY_4
    write_json(file, words)
    copy_code(folder, "language_config")


REMOTE: Final = {"trust_remote_code": True}
ENTRIES: Final = (
    TinyModel("Phi4ForCausalLMV", _phi4v, image=IMAGE_4, engine=REMOTE),
    TinyModel("Phi3VForCausalLM", _phi3v, image=IMAGE_3, engine=REMOTE),
)
