# SPDX-License-Identifier: Apache-2.0
"""Ovis 2 and Ovis 2.5: images become distributions over a visual vocabulary.

vLLM has the ids of the families' special tokens as constants, hence a large vocabulary.
"""

from pathlib import Path
from typing import Final

from transformers import CLIPImageProcessor

from testing.tiny.table.entry import TinyModel
from testing.tiny.table.folder import (
    HIDDEN,
    save_placed,
    text_fields,
    vision_fields,
    write_config,
    write_configuration,
)
from testing.tiny.table.parts import write_json

TILE: Final = 112
VISUAL_WORDS: Final = 128

_PLACES: Final = {
    "<|image_pad|>": 151655,
    "<image>": 151665,
    "<video>": 151666,
    "<ovis_visual_atom>": 151671,
    "<ovis_image_start>": 151672,
    "<ovis_image_end>": 151673,
    "<ovis_video_start>": 151674,
    "<ovis_video_end>": 151675,
}


def _write_processor(folder: Path, kind: str, mean: float) -> None:
    CLIPImageProcessor(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        do_center_crop=False,
        image_mean=[mean] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)
    write_json(folder / "processor_config.json", {"processor_class": kind})


def _write_ovis2(folder: Path) -> None:
    tokenizer = save_placed(folder, {"<|image_pad|>": 151655})
    visual = {
        "model_type": "aimv2_visual_tokenizer",
        "vocab_size": VISUAL_WORDS,
        "tokenize_function": "softmax",
        "hidden_stride": 2,
        "backbone_config": vision_fields(
            model_type="aimv2",
            image_size=TILE,
            patch_size=14,
            num_channels=3,
            qkv_bias=False,
            mlp_bias=False,
            rms_norm_eps=1e-5,
        ),
    }
    config = {
        "model_type": "ovis",
        "hidden_size": HIDDEN,
        "llm_config": text_fields(
            tokenizer, model_type="qwen2", architectures=["Qwen2ForCausalLM"]
        ),
        "visual_tokenizer_config": visual,
    }
    write_config(folder, "Ovis", config)
    _write_processor(folder, "OvisProcessor", 0.5)


def _write_ovis2_5(folder: Path) -> None:
    tokenizer = save_placed(folder, _PLACES)
    named = write_configuration(
        folder, "ovis2_5", {"text_config": "Qwen3Config", "vit_config": "PretrainedConfig"}
    )
    config = {
        **named,
        "hidden_size": HIDDEN,
        "visual_vocab_size": VISUAL_WORDS,
        "text_config": text_fields(
            tokenizer, architectures=["Qwen3ForCausalLM"], head_dim=HIDDEN // 2
        ),
        "vit_config": vision_fields(
            model_type="siglip2_navit",
            image_size=8 * 16,
            patch_size=16,
            temporal_patch_size=1,
            num_channels=3,
            num_patches=-1,
            hidden_stride=2,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
            attention_dropout=0.0,
            preserve_original_pe=True,
            use_rope=True,
            window_size=112,
            fullatt_block_indexes=None,
        ),
    }
    write_config(folder, "Ovis2_5", config)
    _write_processor(folder, "Ovis2_5Processor", 0.5)


ENTRIES: Final = [
    TinyModel(architecture="Ovis", write=_write_ovis2, image="<image>\n"),
    TinyModel(
        architecture="Ovis2_5",
        write=_write_ovis2_5,
        image="<image>\n",
        video="<video>\n",
        engine={"trust_remote_code": True},
    ),
]
