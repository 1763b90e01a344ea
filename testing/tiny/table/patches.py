# SPDX-License-Identifier: Apache-2.0
"""Families whose images are of any size and become groups of patches, as in Qwen2-VL."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from transformers import (
    CohereCompassImageProcessor,
    CohereCompassProcessor,
    CohereCompassVideoProcessor,
    PaddleOCRVLImageProcessor,
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.exaone4_5 import Exaone4_5_Processor

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
)
from testing.tiny.words import rotary, token_id

PATCH: Final = 14
UNIT: Final = 2 * PATCH
SIDE: Final = 8 * UNIT


def grid(temporal: int = 2) -> dict[str, Any]:
    """Return settings of the image processors: up to 64 groups of patches."""
    return {
        "patch_size": PATCH,
        "merge_size": 2,
        "temporal_patch_size": temporal,
        "size": {"shortest_edge": UNIT**2, "longest_edge": SIDE**2},
    }


def window_tower(**own: Any) -> dict[str, Any]:
    """Return the tower of Qwen2.5-VL: attention in windows, and over the whole image."""
    return {
        "depth": LAYERS,
        "hidden_size": HIDDEN,
        "out_hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_heads": HEADS,
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 2 * UNIT,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        **own,
    }


def _save_qwen(kind: Any, folder: Path, tokenizer: PreTrainedTokenizerFast, temporal: int) -> None:
    kind(
        image_processor=Qwen2VLImageProcessor(**grid(temporal)),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**grid(temporal)),
    ).save_pretrained(folder)


def _ids(tokenizer: PreTrainedTokenizerFast, **marks: str) -> dict[str, int]:
    return {field: token_id(tokenizer, mark) for field, mark in marks.items()}


def _write_paddle(folder: Path) -> None:
    tokenizer = save_marked(
        folder, *("<|IMAGE_START|>", "<|IMAGE_END|>"), image_token="<|IMAGE_PLACEHOLDER|>"
    )
    config = {
        "model_type": "paddleocr_vl",
        "text_config": text_fields(
            tokenizer,
            head_dim=HIDDEN // HEADS,
            rope_parameters=rotary([4, 6, 6]),
        ),
        "vision_config": vision_fields(image_size=112, patch_size=PATCH, spatial_merge_size=2),
        "tie_word_embeddings": False,
        **_ids(
            tokenizer,
            image_token_id="<|IMAGE_PLACEHOLDER|>",
            video_token_id="<|IMAGE_PLACEHOLDER|>",
            vision_start_token_id="<|IMAGE_START|>",
            vision_end_token_id="<|IMAGE_END|>",
        ),
    }
    write_config(folder, "PaddleOCRVLForConditionalGeneration", config)
    PaddleOCRVLProcessor(
        image_processor=PaddleOCRVLImageProcessor(**grid(1)), tokenizer=tokenizer
    ).save_pretrained(folder)


def _write_dots(folder: Path) -> None:
    tokenizer = save_marked(folder, "<|img|>", "<|imgpad|>", "<|endofimg|>", "<|video_pad|>")
    config = {
        **write_configuration(
            folder,
            "dots_ocr",
            {"vision_config": "PretrainedConfig"},
            name="DotsOCRConfig",
            base="Qwen2Config",
        ),
        **text_fields(tokenizer),
        **_ids(tokenizer, image_token_id="<|imgpad|>", video_token_id="<|video_pad|>"),
        "vision_config": vision_fields(
            embed_dim=HIDDEN,
            patch_size=PATCH,
            num_channels=3,
            spatial_merge_size=2,
            temporal_patch_size=1,
            rms_norm_eps=1e-5,
            use_bias=False,
            post_norm=True,
            is_causal=False,
        ),
    }
    write_config(folder, "DotsOCRForCausalLM", config)
    _save_qwen(Qwen2VLProcessor, folder, tokenizer, temporal=1)


def _write_exaone(folder: Path) -> None:
    tokenizer = save_marked(folder, "<vision>", "</vision>", "<|image_pad|>", "<|video_pad|>")
    config = {
        "model_type": "exaone4_5",
        "text_config": text_fields(
            tokenizer,
            model_type="exaone4",
            sliding_window=None,
            layer_types=["full_attention"] * LAYERS,
        ),
        "vision_config": window_tower(num_key_value_heads=1, hidden_act="silu"),
        **_ids(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
        **_ids(tokenizer, vision_start_token_id="<vision>", vision_end_token_id="</vision>"),
    }
    write_config(folder, "Exaone4_5_ForConditionalGeneration", config)
    _save_qwen(Exaone4_5_Processor, folder, tokenizer, temporal=2)


def _write_compass(folder: Path) -> None:
    marks = ("<|VISION_START|>", "<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|VISION_END|>")
    tokenizer = save_marked(folder, *marks)
    tower = window_tower(hidden_act="silu", num_position_embeddings=64)
    config = {
        "model_type": "cohere_compass",
        "text_config": text_fields(
            tokenizer,
            tie_word_embeddings=True,
            logit_scale=1.0,
            sliding_window=512,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "sliding_attention": rotary([6, 5, 5], mrope_interleaved=True),
            },
        ),
        "vision_config": {**tower, "deepstack_visual_indexes": [0]},
        "tie_word_embeddings": True,
        **_ids(
            tokenizer,
            vision_start_token_id=marks[0],
            image_token_id=marks[1],
            video_token_id=marks[2],
            vision_end_token_id=marks[3],
        ),
    }
    write_config(folder, "CohereCompassForConditionalGeneration", config)
    CohereCompassProcessor(
        image_processor=CohereCompassImageProcessor(**grid()),
        tokenizer=tokenizer,
        video_processor=CohereCompassVideoProcessor(**grid()),
    ).save_pretrained(folder)


def _entry(
    architecture: str,
    write: Callable[[Path], None],
    image: str,
    video: str | None = None,
    engine: Mapping[str, Any] | None = None,
) -> TinyModel:
    return TinyModel(architecture, write, image=image, video=video, engine=engine or {})


ENTRIES: Final = [
    _entry(
        "PaddleOCRVLForConditionalGeneration",
        _write_paddle,
        "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
    ),
    _entry(
        "DotsOCRForCausalLM",
        _write_dots,
        "<|img|><|imgpad|><|endofimg|>",
        engine={"trust_remote_code": True},
    ),
    _entry(
        "Exaone4_5_ForConditionalGeneration",
        _write_exaone,
        "<vision><|image_pad|></vision>",
        video="<vision><|video_pad|></vision>",
    ),
    _entry(
        "CohereCompassForConditionalGeneration",
        _write_compass,
        "<|VISION_START|><|IMAGE_PAD|><|VISION_END|>",
    ),
]
