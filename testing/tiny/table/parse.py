# SPDX-License-Identifier: Apache-2.0
"""Nemotron Parse: the decoder attends to the image, which is not in the prompt.

vLLM's class has the widths of RADIO-H and of what it passes on as constants.
"""

from pathlib import Path
from typing import Final

from testing.tiny.table.entry import TinyModel
from testing.tiny.table.folder import (
    LAYERS,
    save_marked,
    vocabulary,
    write_config,
    write_configuration,
    write_processor,
)

SIDE: Final = 128
PATCH: Final = 16
WIDTH: Final = 1024


def _write(folder: Path) -> None:
    tokenizer = save_marked(folder)
    parts = dict.fromkeys(("encoder", "decoder"), "PretrainedConfig")
    decoder = {
        "vocab_size": vocabulary(tokenizer),
        "d_model": WIDTH,
        "hidden_size": WIDTH,
        "decoder_layers": LAYERS,
        "num_hidden_layers": LAYERS,
        "decoder_attention_heads": 16,
        "num_attention_heads": 16,
        "encoder_ffn_dim": WIDTH,
        "activation_function": "gelu",
        "scale_embedding": True,
        "max_position_embeddings": 4096,
    }
    encoder = {
        "patch_size": PATCH,
        "args": {
            "model": "vit_huge_patch16_224",
            "patch_size": PATCH,
            "cpe_max_size": 2 * SIDE,
            "teachers": [{"name": name} for name in ("clip", "siglip", "dino")],
            "cls_token_per_teacher": True,
        },
    }
    config = {
        **write_configuration(folder, "nemotron_parse", parts),
        "is_encoder_decoder": True,
        "image_size": [SIDE, SIDE],
        "encoder": encoder,
        "decoder": decoder,
    }
    write_config(folder, "NemotronParseForConditionalGeneration", config)
    write_processor(folder, "SquareProcessor", side=SIDE)


ENTRIES: Final = [
    TinyModel(
        architecture="NemotronParseForConditionalGeneration",
        write=_write,
        image="",
        engine={"trust_remote_code": True, "limit_mm_per_prompt": {"image": 1}},
    ),
]
