# SPDX-License-Identifier: Apache-2.0
"""Gemma 3n and Gemma 4, both with an input of its own per layer, and a tower for audio."""

from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken
from transformers import (
    Gemma3nAudioFeatureExtractor,
    Gemma3nConfig,
    Gemma3nProcessor,
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    SiglipImageProcessor,
)

from testing.tiny.gemma3 import NEWLINES
from testing.tiny.table.entry import TinyModel
from testing.tiny.table.parts import LAYERS, TOWER, save, text
from testing.tiny.words import HIDDEN, token_id, tokenizer_with

SOFT_TOKENS: Final = 70
"""The fewest that Gemma 4 knows."""
MARKS_4: Final = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "video_token": "<|video|>",
}

IMAGE_3N: Final = 256
TOKENS_3N: Final = (IMAGE_3N // 32) ** 2
MARKS_3N: Final = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "audio_token": "<audio_soft_token>",
    "boa_token": "<start_of_audio>",
    "eoa_token": "<end_of_audio>",
}


def _gemma4(folder: Path) -> None:
    tokenizer = tokenizer_with(MARKS_4)
    processor = Gemma4Processor(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessor(max_soft_tokens=SOFT_TOKENS),
        tokenizer,
        Gemma4VideoProcessor(),
        image_seq_length=SOFT_TOKENS,
    )
    ids: dict[str, Any] = {f"{name}_id": token_id(tokenizer, MARKS_4[name]) for name in MARKS_4}
    config = Gemma4Config(
        vision_config={
            **TOWER,
            "num_key_value_heads": TOWER["num_attention_heads"],
            "head_dim": 32,
            "default_output_length": SOFT_TOKENS,
        },
        text_config=text(
            tokenizer,
            head_dim=32,
            global_head_dim=64,
            layer_types=["sliding_attention", "full_attention"],
            vocab_size_per_layer_input=len(tokenizer),
            hidden_size_per_layer_input=HIDDEN // 4,
        ),
        tie_word_embeddings=False,
        eoa_token_index=ids.pop("eoa_token_id"),
        **ids,
    )
    save(folder, "Gemma4ForConditionalGeneration", config, processor)


def _gemma3n(folder: Path) -> None:
    tokenizer = tokenizer_with(MARKS_3N)
    tokenizer.add_tokens([AddedToken(lines, normalized=False) for lines in NEWLINES])
    processor = Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(),
        SiglipImageProcessor(size={"height": IMAGE_3N, "width": IMAGE_3N}),
        tokenizer,
        image_seq_length=TOKENS_3N,
    )
    ids: dict[str, Any] = {f"{name}_id": token_id(tokenizer, MARKS_3N[name]) for name in MARKS_3N}
    beyond = {"vocab_size": 8, "rms_norm_eps": 1e-6}
    config = Gemma3nConfig(
        # The released tower, a MobileNetV5, has one size; this network gives features as it does.
        vision_config={
            **beyond,
            "architecture": "test_convnext",
            "hidden_size": 64,
            "vocab_offset": len(tokenizer),
        },
        audio_config={
            **beyond,
            "hidden_size": 64,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": [8, 8],
            "vocab_offset": len(tokenizer) + beyond["vocab_size"],
        },
        text_config=text(
            tokenizer,
            num_hidden_layers=2 * LAYERS,
            num_kv_shared_layers=LAYERS,
            layer_types=["sliding_attention", "full_attention"] * LAYERS,
            head_dim=32,
            activation_sparsity_pattern=[0.0] * (2 * LAYERS),
            vocab_size_per_layer_input=len(tokenizer),
            hidden_size_per_layer_input=HIDDEN // 4,
            laurel_rank=8,
        ),
        vision_soft_tokens_per_image=TOKENS_3N,
        tie_word_embeddings=False,
        **ids,
    )
    save(folder, "Gemma3nForConditionalGeneration", config, processor)


ENTRIES: Final = (
    TinyModel(
        "Gemma3nForConditionalGeneration",
        _gemma3n,
        image="<image_soft_token>",
        # vLLM does not find an image that a newline follows: it becomes one with the image's own.
        template="USER: {items} {question} ASSISTANT:",
    ),
    TinyModel("Gemma4ForConditionalGeneration", _gemma4, image="<|image|>", video="<|video|>"),
)
