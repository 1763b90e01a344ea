# SPDX-License-Identifier: Apache-2.0
"""Families that vLLM serves with the code of Qwen3-VL: other language models, or other names."""

from functools import partial
from pathlib import Path
from typing import Any, Final

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from testing.tiny.qwen_vl import MARKS, mark_ids
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
from testing.tiny.table.parts import write_json
from testing.tiny.words import rotary

PATCH: Final = 16
UNIT: Final = 2 * PATCH
HEAD: Final = HIDDEN // HEADS

_MEAN: Final = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_GRID: Final = {"patch_size": PATCH, "merge_size": 2, **_MEAN}
_SIZE: Final = {"shortest_edge": UNIT**2, "longest_edge": 64 * UNIT**2}
_VIDEO_SIZE: Final = {**_SIZE, "longest_edge": 512 * UNIT**2}
_TOWER: Final[dict[str, Any]] = {
    "depth": LAYERS,
    "num_heads": HEADS,
    "hidden_size": HIDDEN,
    "out_hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "in_channels": 3,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
}
_EXPERTS: Final[dict[str, Any]] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": HIDDEN,
    "shared_expert_intermediate_size": HIDDEN,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_ROTARY: Final = rotary([6, 5, 5], mrope_interleaved=True)


_VIDEO: Final = "<|vision_start|><|video_pad|><|vision_end|>"


def _save_processor(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    grid = {**_GRID, "temporal_patch_size": 2}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**grid, size=_SIZE),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**grid, size=_VIDEO_SIZE),
    ).save_pretrained(folder)


def _cosmos3(folder: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "model_type": "cosmos3_omni",
        "vision_config": {**_TOWER, "deepstack_visual_indexes": [0, 1]},
        "text_config": text_fields(tokenizer, head_dim=HEAD, rope_parameters=_ROTARY),
    }


def _s2_preview(folder: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    parts = {"text_config": "Qwen3_5MoeTextConfig", "vision_config": "Qwen3_5MoeVisionConfig"}
    language = text_fields(
        tokenizer,
        **_EXPERTS,
        layer_types=["linear_attention", "full_attention"],
        head_dim=HEAD,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        rope_parameters=rotary([3, 3, 2], partial_rotary_factor=0.5, mrope_interleaved=True),
    )
    named = write_configuration(folder, "interns2_preview", parts)
    return {**named, "vision_config": _TOWER, "text_config": language}


_CONFIGS: Final = {
    "Cosmos3ForConditionalGeneration": _cosmos3,
    "InternS2PreviewForConditionalGeneration": _s2_preview,
}


def _write(architecture: str, folder: Path) -> None:
    tokenizer = save_marked(folder, *MARKS)
    config = _CONFIGS[architecture](folder, tokenizer)
    write_config(
        folder, architecture, {**config, **mark_ids(tokenizer), "tie_word_embeddings": False}
    )
    _save_processor(folder, tokenizer)


def _write_edge(folder: Path) -> None:
    tokenizer = save_marked(folder, *MARKS)
    config = {
        "model_type": "cosmos3_edge",
        **mark_ids(tokenizer),
        "vision_config": vision_fields(num_channels=3, num_patches=64, patch_size=PATCH),
        "projector_config": {
            "input_hidden_size": HIDDEN,
            "merger_intermediate_size": 2 * HIDDEN,
            "out_hidden_size": HIDDEN,
        },
        "text_config": text_fields(
            tokenizer,
            head_dim=HEAD,
            rope_parameters=_ROTARY,
            hybrid_override_pattern="*-" * LAYERS,
        ),
    }
    write_config(folder, "Cosmos3EdgeForConditionalGeneration", config)
    write_json(folder / "processor_config.json", {"processor_class": "Cosmos3EdgeProcessor"})
    write_json(folder / "preprocessor_config.json", {**_GRID, "size": _SIZE})
    write_json(
        folder / "video_preprocessor_config.json",
        {**_GRID, "temporal_patch_size": 1, "size": _VIDEO_SIZE},
    )


_ENGINES: Final[dict[str, dict[str, Any]]] = {
    # vLLM's linear attention for CPUs computes in bfloat16 only.
    "InternS2PreviewForConditionalGeneration": {"trust_remote_code": True, "dtype": "bfloat16"},
}


def _entry(architecture: str) -> TinyModel:
    return TinyModel(
        architecture=architecture,
        write=_write_edge if "Edge" in architecture else partial(_write, architecture),
        image="<|vision_start|><|image_pad|><|vision_end|>",
        video=_VIDEO,
        engine=_ENGINES.get(architecture, {}),
    )


ENTRIES: Final = [_entry(name) for name in (*_CONFIGS, "Cosmos3EdgeForConditionalGeneration")]
