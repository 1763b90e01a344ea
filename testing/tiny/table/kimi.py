# SPDX-License-Identifier: Apache-2.0
"""Kimi-VL and Kimi K2.5: MoonViT before a DeepSeek with latent attention and experts.

K2.5 takes images and parts of videos as one kind, vision chunks.
"""

from pathlib import Path
from typing import Any, Final

from transformers import Kimi_K25Config, PreTrainedTokenizerFast

from testing.tiny.table.entry import TinyModel
from testing.tiny.table.parts import TOWER, text, with_code, write_config, write_json
from testing.tiny.words import HIDDEN, chat_template, token_id, tokenizer_for

START, CONTENT, PAD, END = "<|media_start|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>"
BEGIN: Final = "<|media_begin|>"
IMAGE_K25: Final = f"{BEGIN}image{CONTENT}{PAD}{END}"
VIDEO_K25: Final = "<|kimi_k25_video_placeholder|>"
CHUNK_K25: Final = f"{BEGIN}video{CONTENT}{PAD}{END}"
PATCH: Final = 14
PATCHES: Final = 1024
IMAGE: Final = f"{START}image{CONTENT}{PAD}{END}"


def _language(tokenizer: PreTrainedTokenizerFast, **own: Any) -> dict[str, Any]:
    return text(
        tokenizer,
        q_lora_rank=None,
        kv_lora_rank=512,  # vLLM's kernels know this size and the next
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        first_k_dense_replace=1,
        **own,
    )


def _kimi_vl(folder: Path) -> None:
    tokenizer = tokenizer_for(chat_template(IMAGE), (START, CONTENT, PAD, END))
    config = {
        "model_type": "kimi_vl",
        "vision_config": {
            **TOWER,
            "model_type": "moonvit",
            "patch_size": PATCH,
            "init_pos_emb_height": 16,
            "init_pos_emb_width": 16,
            "merge_kernel_size": [2, 2],
        },
        "text_config": _language(
            tokenizer, model_type="deepseek_v2", topk_method="greedy", scoring_func="softmax"
        ),
        "media_placeholder_token_id": token_id(tokenizer, PAD),
        "pad_token_id": tokenizer.pad_token_id,
    }
    write_config(folder, "KimiVLForConditionalGeneration", config)
    with_code(folder, tokenizer, "kimi_vl", "KimiVLProcessor")


def _kimi_k25(folder: Path) -> None:
    tokenizer = tokenizer_for(chat_template(IMAGE_K25, VIDEO_K25), (BEGIN, CONTENT, PAD, END))
    tokenizer.save_pretrained(folder)
    config = Kimi_K25Config(
        vision_config={
            **TOWER,
            "patch_size": PATCH,
            "pos_emb_height": 16,
            "pos_emb_width": 16,
            "merge_kernel_size": [2, 2],
        },
        text_config=_language(
            tokenizer, model_type="deepseek_v3", topk_method="noaux_tc", scoring_func="sigmoid"
        ),
        projection_hidden_size=TOWER["hidden_size"],
        image_token_id=token_id(tokenizer, PAD),
        vision_start_token_id=token_id(tokenizer, BEGIN),
        vision_end_token_id=token_id(tokenizer, END),
        tie_word_embeddings=False,
    )
    # As in the published configuration, for vLLM alone.
    config.use_unified_vision_chunk, config.video_placeholder = True, VIDEO_K25
    config.architectures = ["KimiK25ForConditionalGeneration"]
    config.save_pretrained(folder)
    limits = {
        "in_patch_limit": PATCHES,
        "patch_limit_on_one_side": PATCHES,
        "in_patch_limit_each_frame": PATCHES,
        "in_patch_limit_video": PATCHES,
        "fixed_output_tokens": None,
        "patch_size": PATCH,
        "merge_kernel_size": 2,
        "temporal_merge_kernel_size": 4,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    write_json(folder / "preprocessor_config.json", {"media_proc_cfg": limits})


def _show_llvmlite() -> None:
    """Give llvmlite's library a ``__dict__``, as any object has that says it has one.

    vLLM's worker on a CPU looks into the objects of all modules, and Kimi K2.5's processor has
    numba imported, hence llvmlite.
    """
    from llvmlite.binding import ffi  # type: ignore[import-untyped, unused-ignore]

    kind: Any = type(ffi.lib)
    find = kind.__getattr__
    kind.__getattr__ = lambda lib, name: {} if name == "__dict__" else find(lib, name)


ENTRIES: Final = (
    TinyModel(
        "KimiVLForConditionalGeneration",
        _kimi_vl,
        image=IMAGE,
        engine={"trust_remote_code": True},
    ),
    TinyModel(
        "KimiK25ForConditionalGeneration",
        _kimi_k25,
        image=IMAGE_K25,
        video=CHUNK_K25,
        chunks=True,
        prepare=_show_llvmlite,
    ),
)
