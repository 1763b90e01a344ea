# SPDX-License-Identifier: Apache-2.0
"""Small Qwen3-VL checkpoints with a ChatML template."""

from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from small_vlm.checkpoint import BOS, EOS, PAD
from testing.tiny.llava import build_once, draw_weights, train_tokenizer
from testing.tiny.qwen_vl import CHATML, END, IMAGE, OVER, START, TURN, VIDEO

PATCH, MERGE = 16, 2
UNIT = PATCH * MERGE
"""Pixels along one side of a token."""
_HIDDEN, _HEADS = 128, 4


def build_qwen3_vl(path: Path) -> Path:
    """Write the checkpoint, unless it is there, and return its folder."""

    def write(folder: Path) -> None:
        tokenizer, ids = chat_tokenizer()
        config = Qwen3VLConfig(
            **marks_of(ids),
            tie_word_embeddings=False,
            vision_config={**VISION, "deepstack_visual_indexes": [0, 1]},
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": _HIDDEN,
                "intermediate_size": 2 * _HIDDEN,
                "num_hidden_layers": 3,
                "num_attention_heads": _HEADS,
                "num_key_value_heads": _HEADS,
                "head_dim": 32,
                "max_position_embeddings": 32768,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10_000.0,
                    "mrope_section": [6, 5, 5],
                    "mrope_interleaved": True,
                },
                "tie_word_embeddings": False,
                "bos_token_id": BOS,
                "eos_token_id": EOS,
                "pad_token_id": PAD,
            },
        )
        save(Qwen3VLForConditionalGeneration(config), tokenizer, folder)

    asked = {"kind": "qwen3-vl", "builder": Path(__file__).read_text()}
    return build_once(path, asked, write)


VISION: dict[str, Any] = {
    "depth": 3,
    "num_heads": 2,
    "hidden_size": 64,
    "out_hidden_size": _HIDDEN,
    "intermediate_size": 128,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
}


def chat_tokenizer() -> tuple[PreTrainedTokenizerFast, dict[str, int]]:
    """Return a tokenizer with Qwen's marks, and their ids."""
    marks = [TURN, OVER, START, END, "<|vision_pad|>", IMAGE, VIDEO]
    # Without LLaVA's own name for its image token, which would be taken for Qwen's.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(1024).backend_tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    return tokenizer, dict(zip(marks, tokenizer.convert_tokens_to_ids(marks), strict=True))


def marks_of(ids: dict[str, int]) -> dict[str, int]:
    """Return the configuration's names of the marks."""
    return {
        "image_token_id": ids[IMAGE],
        "video_token_id": ids[VIDEO],
        "vision_start_token_id": ids[START],
        "vision_end_token_id": ids[END],
    }


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Draw weights, and write model and processor."""
    draw_weights(model, tokenizer, 0)
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    model.save_pretrained(folder)
    size = {"shortest_edge": UNIT**2, "longest_edge": 64 * UNIT**2}
    # One normalisation for both, as released: vLLM does both in one place of the model.
    mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    grid = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGE, **mean}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**grid, size=size),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**grid, size={**size, "longest_edge": 512 * UNIT**2}),
        chat_template=CHATML,
    ).save_pretrained(folder)
