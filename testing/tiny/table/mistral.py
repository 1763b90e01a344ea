# SPDX-License-Identifier: Apache-2.0
"""Pixtral in Mistral's own format: ``params.json`` and ``tekken.json``.

Its chat encoding writes an image's whole placeholder into a prompt, so prompts are token ids.
"""

import json
from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from PIL import Image

from small_vlm.checkpoint import HEAD_DIM
from testing.tiny.llava import SENTENCES
from testing.tiny.mistral3 import PATCH_SIZE, SIDE
from testing.tiny.table.entry import TinyModel
from testing.tiny.words import HEADS, HIDDEN

_MERGE = 2
_SPECIAL = Tekkenizer.DEPRECATED_SPECIAL_TOKENS
_IDS = {each["token_str"]: each["rank"] for each in _SPECIAL}


def _write(folder: Path) -> None:
    vocab = _vocab()
    pixels = SIDE * _MERGE * PATCH_SIZE
    tekken = {
        "config": {
            "pattern": r"\s?\w+|\s?[^\s\w]+|\s+",
            "num_vocab_tokens": len(vocab),
            "default_vocab_size": len(vocab) + len(_SPECIAL),
            "default_num_special_tokens": len(_SPECIAL),
            "version": "v7",
        },
        "vocab": vocab,
        "special_tokens": list(_SPECIAL),
        "image": {
            "image_patch_size": PATCH_SIZE,
            "max_image_size": pixels,
            "spatial_merge_size": _MERGE,
        },
    }
    params = {
        "dim": HIDDEN,
        "hidden_dim": 2 * HIDDEN,
        "n_layers": 3,
        "n_heads": HEADS,
        "n_kv_heads": HEADS,
        "head_dim": HEAD_DIM,
        "norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "vocab_size": len(vocab) + len(_SPECIAL),
        "max_position_embeddings": 4096,
        "vision_encoder": {
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": 3,
            "num_attention_heads": HEADS,
            "num_channels": 3,
            "image_size": pixels,
            "max_image_size": pixels,
            "patch_size": PATCH_SIZE,
            "rope_theta": 10_000.0,
            "adapter_bias": False,
            "add_pre_mm_projector_layer_norm": True,
            "mm_projector_id": "patch_merge",
            "spatial_merge_size": _MERGE,
            "image_token_id": _IDS["[IMG]"],
            "image_break_token_id": _IDS["[IMG_BREAK]"],
            "image_end_token_id": _IDS["[IMG_END]"],
        },
    }
    for name, content in (("tekken", tekken), ("params", params)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def _vocab() -> list[dict[str, Any]]:
    """Return all bytes, and the words of our sentences."""
    words = {word for sentence in SENTENCES for word in sentence.split()}
    every = [bytes([each]) for each in range(256)]
    every += sorted(f" {word}".encode() for word in words)
    return [
        {"rank": rank, "token_bytes": b64encode(each).decode(), "token_str": None}
        for rank, each in enumerate(every)
    ]


@cache
def _tokenizer() -> MistralTokenizer:
    with TemporaryDirectory() as folder:
        _write(Path(folder))
        return MistralTokenizer.from_file(str(Path(folder) / "tekken.json"))


def _tokens(question: str, images: Sequence[Image.Image]) -> list[int]:
    content = [*(ImageChunk(image=each) for each in images), TextChunk(text=question)]
    request: Any = ChatCompletionRequest(messages=[UserMessage(content=content)])
    return list(_tokenizer().encode_chat_completion(request).tokens)


ENTRIES = (
    TinyModel(
        "PixtralForConditionalGeneration",
        _write,
        image="[IMG]",
        tokens=_tokens,
        engine={
            "config_format": "mistral",
            "tokenizer_mode": "mistral",
            "limit_mm_per_prompt": {"image": 2},
        },
    ),
)
