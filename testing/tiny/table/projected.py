# SPDX-License-Identifier: Apache-2.0
"""Families of a tower, a projector and a language model: BAGEL, Kanana-V, R, OpenVLA, Muse."""

from pathlib import Path
from typing import Any, Final

from transformers import LlavaNextImageProcessor, LlavaNextProcessor, SiglipImageProcessor

from testing.tiny.table.entry import TinyModel
from testing.tiny.table.folder import (
    HEADS,
    HIDDEN,
    LAYERS,
    save_marked,
    text_fields,
    vision_fields,
    write_config,
    write_configuration,
    write_processor,
)
from testing.tiny.words import token_id

SIDE: Final = 112
PATCH: Final = 14

_SIGLIP: Final[dict[str, Any]] = vision_fields(
    model_type="siglip_vision_model",
    image_size=SIDE,
    patch_size=PATCH,
    num_channels=3,
    vision_use_head=False,
)


def _write_bagel(folder: Path) -> None:
    tokenizer = save_marked(folder, "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
    config = {
        "model_type": "bagel",
        "llm_config": text_fields(tokenizer),
        "vit_config": _SIGLIP,
        "vit_max_num_patch_per_side": SIDE // PATCH,
    }
    write_config(folder, "BagelForConditionalGeneration", config)
    SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def _write_kanana(folder: Path) -> None:
    # vLLM takes the token after the one that ends a text for the one of images.
    tokenizer = save_marked(folder, "<image>", "<|end|>", "<|media|>")
    tower = {
        "depth": LAYERS,
        "embed_dim": HIDDEN,
        "hidden_size": HIDDEN,
        "num_heads": HEADS,
        "mlp_ratio": 2,
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
    }
    parts = {
        "text_config": "LlamaConfig",
        "vision_config": "PretrainedConfig",
        "projector_config": "PretrainedConfig",
    }
    config = {
        **write_configuration(folder, "kanana-1.5-v", parts),
        "text_config": text_fields(tokenizer, eos_token_id=token_id(tokenizer, "<|end|>")),
        "vision_config": {**tower, "hidden_act": "quick_gelu"},
        "projector_config": {
            "merge_size": 2,
            "pos_emb": True,
            "pos_emb_size": 64,
            "encoder_hidden_size": HIDDEN,
            "hidden_size": HIDDEN,
            "output_hidden_size": HIDDEN,
            "depth": 1,
            "mlp_depth": 2,
            "feature_layer_index": -1,
        },
    }
    write_config(folder, "KananaVForConditionalGeneration", config)
    write_processor(folder, "PatchProcessor", patch_size=PATCH, merge_size=2)


def _write_r(folder: Path) -> None:
    tokenizer = save_marked(folder, image_token="<image>")
    grid = [[SIDE * high, SIDE * wide] for high in range(1, 3) for wide in range(1, 3)]
    parts = {"text_config": "Qwen3Config", "vision_config": "SiglipVisionConfig"}
    config = {
        **write_configuration(folder, "rvl", parts),
        "text_config": text_fields(
            tokenizer, architectures=["Qwen3ForCausalLM"], head_dim=HIDDEN // HEADS
        ),
        "vision_config": _SIGLIP,
        "image_token_index": token_id(tokenizer, "<image>"),
        "image_grid_pinpoints": grid,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
    }
    write_config(folder, "RForConditionalGeneration", config)
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_grid_pinpoints=grid,
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
    ).save_pretrained(folder)


def _write_openvla(folder: Path) -> None:
    tokenizer = save_marked(folder, "<PAD>")
    config = {
        "model_type": "openvla",
        "image_token_index": token_id(tokenizer, "<PAD>"),
        "image_sizes": [224, 224],
        "text_config": text_fields(tokenizer),
    }
    write_config(folder, "OpenVLAForActionPrediction", config)


def _write_muse(folder: Path) -> None:
    tokenizer = save_marked(
        folder,
        *("<|image|>", "<|patch|>", "<|video|>", "<|image_start|>", "<|image_end|>"),
        *("<|vid_start|>", "<|vid_end|>", "<|vid_frame_separator|>"),
    )
    config = {
        "model_type": "muse_glimmer",
        "image_token_id": token_id(tokenizer, "<|patch|>"),
        "video_token_id": token_id(tokenizer, "<|video|>"),
        "text_config": text_fields(tokenizer, head_dim=HIDDEN // HEADS, sliding_window=512),
        "vision_config": vision_fields(
            patch_size=PATCH,
            pos_emb_height=8,
            pos_emb_width=8,
            max_position_embeddings=64,
            output_dim=4 * HIDDEN,
            adapter_dim=HIDDEN,
        ),
    }
    write_config(folder, "MuseGlimmerForConditionalGeneration", config)


ENTRIES: Final = [
    TinyModel(
        "BagelForConditionalGeneration",
        _write_bagel,
        image="<|vision_start|><|image_pad|><|vision_end|>",
    ),
    TinyModel(
        "KananaVForConditionalGeneration",
        _write_kanana,
        image="<image>\n",
        # The largest image that vLLM measures has 100 million pixels.
        engine={"trust_remote_code": True, "skip_mm_profiling": True},
    ),
    TinyModel(
        "RForConditionalGeneration",
        _write_r,
        image="<image>\n",
        engine={"trust_remote_code": True},
    ),
    TinyModel(
        "OpenVLAForActionPrediction",
        _write_openvla,
        image="",  # the image stands behind the first token
        engine={"limit_mm_per_prompt": {"image": 1}},
    ),
    TinyModel(
        "MuseGlimmerForConditionalGeneration",
        _write_muse,
        image="<|patch|>",
        video="<|video|>",
        engine={"skip_mm_profiling": True},
    ),
]
