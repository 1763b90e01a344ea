# SPDX-License-Identifier: Apache-2.0
"""Families with little in common with others: BLIP-2, Isaac, Moondream 3."""

from pathlib import Path
from typing import Final

from transformers import Blip2Processor, BlipImageProcessor

from testing.tiny.table.entry import TinyModel
from testing.tiny.table.folder import (
    HEADS,
    HIDDEN,
    LAYERS,
    save_marked,
    save_placed,
    text_fields,
    vision_fields,
    vocabulary,
    write_config,
)
from testing.tiny.table.parts import write_json
from testing.tiny.words import rotary, token_id

SIDE: Final = 112


def _write_blip2(folder: Path) -> None:
    tokenizer = save_marked(folder, image_token="<image>")
    config = {
        "model_type": "blip-2",
        "num_query_tokens": 32,
        "image_token_index": token_id(tokenizer, "<image>"),
        "vision_config": vision_fields(image_size=SIDE, patch_size=14),
        "qformer_config": vision_fields(
            vocab_size=vocabulary(tokenizer), encoder_hidden_size=HIDDEN
        ),
        "text_config": {
            **text_fields(tokenizer, model_type="opt", architectures=["OPTForCausalLM"]),
            "ffn_dim": 2 * HIDDEN,
            "word_embed_proj_dim": HIDDEN,
        },
    }
    write_config(folder, "Blip2ForConditionalGeneration", config)
    Blip2Processor(
        image_processor=BlipImageProcessor(size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        num_query_tokens=32,
    ).save_pretrained(folder)


def _write_isaac(folder: Path) -> None:
    tokenizer = save_marked(folder, "<image>", "<|image_pad|>")
    language = text_fields(tokenizer, head_dim=HIDDEN // HEADS, rope_parameters=rotary([6, 5, 5]))
    config = {
        **language,
        "model_type": "isaac",
        "text_config": language,
        "vision_config": vision_fields(
            patch_size=16, num_channels=3, num_patches=256, pixel_shuffle_scale_factor=2
        ),
        "vision_patch_size": 16,
        "vision_max_num_patches": 256,
        "vision_min_num_patches": 16,
        "pixel_shuffle_scale": 2,
        "vision_token": "<image>",
    }
    write_config(folder, "IsaacForConditionalGeneration", config)


def _write_moondream(folder: Path) -> None:
    marks = {"<|endoftext|>": 0, "<|md_reserved_0|>": 1, "<|md_reserved_1|>": 2}
    tokenizer = save_placed(folder, {**marks, "<|md_reserved_2|>": 3, "<image>": 1100})
    config = {
        "model_type": "moondream3",
        "config": {
            "text": {
                "dim": HIDDEN,
                "ff_dim": 2 * HIDDEN,
                "n_layers": LAYERS,
                "vocab_size": vocabulary(tokenizer),
                "n_heads": HEADS,
                "n_kv_heads": HEADS,
                "moe": {
                    "start_layer": 1,
                    "n_experts": 4,
                    "n_experts_per_tok": 2,
                    "expert_inner_dim": HIDDEN,
                },
            },
            "vision": {
                "enc_dim": HIDDEN,
                "enc_n_layers": 27,  # vLLM pools to so many rows and columns, too
                "enc_ff_dim": 2 * HIDDEN,
                "enc_n_heads": HEADS,
                "proj_inner_dim": 2 * HIDDEN,
            },
        },
    }
    write_config(folder, "Moondream3ForCausalLM", config)
    write_json(folder / "processor_config.json", {"processor_class": "Moondream3Processor"})


ENTRIES: Final = [
    TinyModel(
        architecture="Blip2ForConditionalGeneration",
        write=_write_blip2,
        image="",  # the image stands before all text
        engine={"limit_mm_per_prompt": {"image": 1}},
    ),
    TinyModel("IsaacForConditionalGeneration", _write_isaac, image="<image>\n"),
    TinyModel(
        architecture="Moondream3ForCausalLM",
        write=_write_moondream,
        image="<image>",
        template="<|endoftext|>{items}<|md_reserved_0|>query<|md_reserved_1|>{question}"
        "<|md_reserved_2|>",
        engine={"limit_mm_per_prompt": {"image": 1}, "max_num_batched_tokens": 1024},
    ),
]
