# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-VL2, DeepSeek-OCR and OCR 2, and Baidu's Unlimited-OCR, which has OCR's tower.

Only the language model is tiny: vLLM's classes build the towers at their public sizes.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from testing.tiny.table.entry import TinyModel
from testing.tiny.table.folder import (
    HIDDEN,
    save_marked,
    text_fields,
    write_config,
)
from testing.tiny.table.parts import write_json

TILE: Final = 112

_OCR: Final[dict[str, Any]] = {
    "model_type": "deepseek_vl_v2",
    "vision_config": {"model_type": "vision", "image_size": 1024},
    "candidate_resolutions": [[1024, 1024]],
}


def _projector(kind: str, width: int) -> dict[str, Any]:
    return {
        "model_type": "mlp_projector",
        "projector_type": kind,
        "input_dim": width,
        "n_embed": HIDDEN,
    }


_CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "DeepseekVLV2ForCausalLM": {
        "model_type": "deepseek_vl_v2",
        "vision_config": {"model_type": "vision", "image_size": TILE, "patch_size": 14},
        "projector_config": _projector("downsample_mlp_gelu", 1152),
        "candidate_resolutions": [[TILE, TILE], [TILE, 2 * TILE], [2 * TILE, TILE]],
    },
    "DeepseekOCRForCausalLM": {**_OCR, "projector_config": _projector("linear", 2048)},
    "DeepseekOCR2ForCausalLM": {**_OCR, "projector_config": _projector("linear", 896)},
    "UnlimitedOCRForCausalLM": {
        **_OCR,
        "model_type": "unlimited-ocr",
        "projector_config": _projector("linear", 2048),
    },
}


def _write(architecture: str, folder: Path) -> None:
    config = _CONFIGS[architecture]
    tokenizer = save_marked(
        folder,
        *("<image>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>"),
        *("<|User|>", "<|Assistant|>"),
    )
    language = text_fields(
        tokenizer,
        model_type="deepseek_v2",
        architectures=["DeepseekV2ForCausalLM"],
        moe_intermediate_size=HIDDEN,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=2,  # no layer has experts
        use_mla=False,
        q_lora_rank=None,
        kv_lora_rank=None,
        qk_nope_head_dim=0,
        qk_rope_head_dim=0,
        v_head_dim=0,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
    )
    write_config(
        folder,
        architecture,
        {"tile_tag": "2D", "global_view_pos": "head", **config, "language_config": language},
    )
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "DeepseekVLV2Processor",
            "candidate_resolutions": config["candidate_resolutions"],
            "patch_size": 14,
            "downsample_ratio": 2,
            "image_token": "<image>",
        },
    )


def _entry(architecture: str, engine: Mapping[str, Any]) -> TinyModel:
    return TinyModel(
        architecture=architecture,
        write=partial(_write, architecture),
        image="<image>\n",
        engine=engine,
    )


# The towers of OCR take images of 1024 pixels; to measure them with 13 tiles costs minutes.
_LARGE: Final = {"skip_mm_profiling": True}

_ENGINES: Final[dict[str, dict[str, Any]]] = {
    "DeepseekOCRForCausalLM": _LARGE,
    "DeepseekOCR2ForCausalLM": _LARGE,
    "UnlimitedOCRForCausalLM": {**_LARGE, "mm_encoder_attn_backend": "TORCH_SDPA"},
}

ENTRIES: Final = [_entry(name, _ENGINES.get(name, {})) for name in _CONFIGS]
