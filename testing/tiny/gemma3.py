# SPDX-License-Identifier: Apache-2.0
"""A small Gemma 3: SigLIP at 224 px and patch 14, 256 patches pooled to 16 tokens; pan and scan."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    PreTrainedTokenizerFast,
)

from small_vlm.checkpoint import HEAD_DIM
from testing.tiny.llava import build_once, draw_weights
from testing.tiny.words import (
    HEADS,
    HIDDEN,
    chat_template,
    text_settings,
    token_id,
    tokenizer_with,
)

IMAGE_SIZE = 224
PATCH_SIZE = 14
TOKENS = 16
MAX_CROPS = 4

START, END, SOFT = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
NEWLINES = ["\n" * count for count in range(1, 5)]
"""Each is one token, as in public checkpoints."""


def build_gemma3(path: Path) -> Path:
    """Write the checkpoint and return its folder."""

    def write(folder: Path) -> None:
        tokenizer = _tokenizer()
        model = _model(tokenizer)
        model.save_pretrained(folder)
        _rename_tower(folder / "model.safetensors")
        processor = Gemma3Processor(
            image_processor=Gemma3ImageProcessor(
                size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
                do_pan_and_scan=False,
                pan_and_scan_min_crop_size=256,
                pan_and_scan_max_num_crops=MAX_CROPS,
                pan_and_scan_min_ratio_to_activate=1.2,
            ),
            tokenizer=tokenizer,
            image_seq_length=TOKENS,
            chat_template=tokenizer.chat_template,
        )
        processor.save_pretrained(folder)

    return build_once(path, {"kind": "gemma3"}, write)


def _rename_tower(file: Path) -> None:
    """Give the tower the key names of public checkpoints, which vLLM 0.32 requires."""
    weights = {
        re.sub(r"\bvision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name): weight
        for name, weight in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tokenizer_with({"boi_token": START, "eoi_token": END, "image_token": SOFT})
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in NEWLINES])
    tokenizer.chat_template = chat_template(START)
    return tokenizer


def _model(tokenizer: PreTrainedTokenizerFast) -> Any:
    config = Gemma3Config(
        vision_config={
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": 3,
            "num_attention_heads": HEADS,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "vision_use_head": False,
        },
        text_config=text_settings(
            tokenizer,
            layers=3,
            head_dim=HEAD_DIM,
            query_pre_attn_scalar=HEAD_DIM,
            sliding_window=512,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            max_position_embeddings=4096,
            tie_word_embeddings=False,
        ),
        mm_tokens_per_image=TOKENS,
        boi_token_index=token_id(tokenizer, START),
        eoi_token_index=token_id(tokenizer, END),
        image_token_index=token_id(tokenizer, SOFT),
        tie_word_embeddings=False,
    )
    model: Any = Gemma3ForConditionalGeneration(config)
    draw_weights(model, tokenizer, seed=0)
    with torch.no_grad():
        # Gemma multiplies embeddings by this; a word must not outweigh what the layers add to it.
        model.get_input_embeddings().weight.div_(HIDDEN**0.5)
    return model
