# SPDX-License-Identifier: Apache-2.0
"""A small Gemma 3: SigLIP at 224 px and patch 14, 256 patches pooled to 16 tokens; pan and scan."""

import hashlib
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

from testing.tiny.llava import BOS, EOS, HEAD_DIM, PAD, build_once, draw_weights
from testing.tiny.words import chat_template, tokenizer_with

IMAGE_SIZE = 224
PATCH_SIZE = 14
TOKENS = 16
MAX_CROPS = 4

START, END, SOFT = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
NEWLINES = ["\n" * count for count in range(1, 5)]
"""Each is one token, as in public checkpoints."""

_WORDS = Path(__file__).with_name("words.py")
_SOURCE = hashlib.sha256(Path(__file__).read_bytes() + _WORDS.read_bytes()).hexdigest()


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

    return build_once(path, {"kind": "gemma3", "builder": _SOURCE}, write)


def _rename_tower(file: Path) -> None:
    """Give the tower the key names of public checkpoints, which vLLM 0.32 insists on."""
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
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 128 // HEAD_DIM,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "vision_use_head": False,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 128 // HEAD_DIM,
            "num_key_value_heads": 128 // HEAD_DIM,
            "head_dim": HEAD_DIM,
            "query_pre_attn_scalar": HEAD_DIM,
            "sliding_window": 512,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        },
        mm_tokens_per_image=TOKENS,
        boi_token_index=tokenizer.convert_tokens_to_ids(START),
        eoi_token_index=tokenizer.convert_tokens_to_ids(END),
        image_token_index=tokenizer.convert_tokens_to_ids(SOFT),
        tie_word_embeddings=False,
    )
    model: Any = Gemma3ForConditionalGeneration(config)
    draw_weights(model, tokenizer, seed=0)
    with torch.no_grad():
        # Gemma multiplies by this; a word must not outweigh all that the layers add to it.
        model.get_input_embeddings().weight.div_(config.text_config.hidden_size**0.5)
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    return model
