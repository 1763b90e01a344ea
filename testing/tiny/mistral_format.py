# SPDX-License-Identifier: Apache-2.0
"""A small Pixtral in Mistral's own format: ``params.json``, ``tekken.json``, and weights.

Its chat encoding writes an image's whole placeholder into a prompt, so prompts are token ids.
"""

import json
from base64 import b64encode
from collections.abc import Iterator, Sequence
from functools import cache
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
from mistral_common.protocol.instruct.messages import SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from PIL import Image
from safetensors.torch import save_file

from small_vlm.checkpoint import HEAD_DIM
from testing.tiny.llava import SENTENCES, build_once
from testing.tiny.mistral3 import PATCH_SIZE, SIDE
from testing.tiny.words import HEADS, HIDDEN

_MERGE = 2
_LAYERS = 3
_SPECIAL = Tekkenizer.DEPRECATED_SPECIAL_TOKENS
_IDS = {each["token_str"]: each["rank"] for each in _SPECIAL}


def build_mistral_format(path: Path) -> Path:
    """Write the model with weights and return its folder."""

    def write(folder: Path) -> None:
        write_files(folder)
        generator = torch.Generator().manual_seed(0)
        weights = {
            name: torch.ones(shape)
            if len(shape) == 1
            else torch.randn(shape, generator=generator) * _deviation(name, shape)
            for name, shape in _shapes()
        }
        save_file(weights, folder / "consolidated.safetensors")

    return build_once(path, {"kind": "mistral format"}, write)


def _deviation(name: str, shape: tuple[int, ...]) -> float:
    return 1.0 if name == "tok_embeddings.weight" else float(prod(shape[1:])) ** -0.5


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of the weights."""
    words = len(_vocab()) + len(_SPECIAL)
    yield from (("tok_embeddings.weight", (words, HIDDEN)), ("output.weight", (words, HIDDEN)))
    yield from _layers("")
    yield "norm.weight", (HIDDEN,)
    yield "vision_encoder.patch_conv.weight", (HIDDEN, 3, PATCH_SIZE, PATCH_SIZE)
    yield "vision_encoder.ln_pre.weight", (HIDDEN,)
    yield from _layers("vision_encoder.transformer.")
    yield "pre_mm_projector_norm.weight", (HIDDEN,)
    yield "patch_merger.merging_layer.weight", (HIDDEN, HIDDEN * _MERGE**2)
    yield "vision_language_adapter.w_in.weight", (HIDDEN, HIDDEN)
    yield "vision_language_adapter.w_out.weight", (HIDDEN, HIDDEN)


def _layers(prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for number in range(_LAYERS):
        layer = f"{prefix}layers.{number}"
        for name in "qkvo":
            yield f"{layer}.attention.w{name}.weight", (HIDDEN, HIDDEN)
        yield f"{layer}.feed_forward.w1.weight", (2 * HIDDEN, HIDDEN)
        yield f"{layer}.feed_forward.w2.weight", (HIDDEN, 2 * HIDDEN)
        yield f"{layer}.feed_forward.w3.weight", (2 * HIDDEN, HIDDEN)
        yield f"{layer}.attention_norm.weight", (HIDDEN,)
        yield f"{layer}.ffn_norm.weight", (HIDDEN,)


def write_files(folder: Path) -> None:
    """Write configuration and tokenizer."""
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
        "n_layers": _LAYERS,
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
            "num_hidden_layers": _LAYERS,
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
def _tokenizer() -> MistralTokenizer[Any, Any, Any, Any, Any]:
    with TemporaryDirectory() as folder:
        write_files(Path(folder))
        return MistralTokenizer.from_file(str(Path(folder) / "tekken.json"))


def prompt_ids(
    question: str, images: Sequence[Image.Image], system: str | None = None
) -> list[int]:
    """Return the token ids of a user's message with images and a question, in this order."""
    content: list[Any] = [*(ImageChunk(image=each) for each in images), TextChunk(text=question)]
    before = [SystemMessage(content=system)] if system is not None else []
    request: Any = ChatCompletionRequest(messages=[*before, UserMessage(content=content)])
    return list(_tokenizer().encode_chat_completion(request).tokens)
