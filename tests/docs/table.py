# SPDX-License-Identifier: Apache-2.0
"""Replacements in a page's commands so that they run in the tests. Everything else is unchanged.

Commands that cannot run in the tests at all are in ``stand_in.py``.
"""

from collections.abc import Callable
from pathlib import Path

from testing.tiny.internvl import build_internvl_hf
from testing.tiny.llava import build_llava
from testing.tiny.onevision import build_onevision
from testing.tiny.qwen3_vl import build_qwen3_vl
from testing.tiny.qwen_vl import build_qwen_vl

# Published checkpoint -> folder and builder of the small random-weight model that replaces it.
MODELS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "llava-hf/llava-1.5-7b-hf": ("llava-clip", build_llava),
    "llava-hf/llava-v1.6-vicuna-7b-hf": ("llava-next", lambda path: build_llava(path, next=True)),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": ("onevision", build_onevision),
    "Qwen/Qwen2.5-VL-7B-Instruct": ("qwen2.5-vl", lambda path: build_qwen_vl(path, "2.5")),
    "Qwen/Qwen3-VL-8B-Instruct": ("qwen3-vl", build_qwen3_vl),
    "OpenGVLab/InternVL3-8B-hf": ("internvl-hf", build_internvl_hf),
}

# Files that the reader supplies; the tests create them in the folder where the page runs.
PHOTOS = ("photo.jpg", "other.jpg", "page.png")
CLIP = "clip.mp4"

SERVER = "localhost:8000"  # replaced by the address of the page's server
PICTURES = "https://example.com/"  # replaced by a server of those files

# Other replacements: what vLLM needs on two CPU cores, as testing.server adds to `vllm serve`.
TEXT = {
    "LLM(model=": 'LLM(dtype="float32", enforce_eager=True, max_num_seqs=8, model=',
}

# The server that most pages use is started once. Another server takes too long for the quick
# tests, and so does a block with one of these words: it starts an engine or vLLM's parser.
SHARED_SERVER = ("llava-hf/llava-1.5-7b-hf", "--plugins", "flashvlm")
SLOW = ("LLM(", "vllm run-batch", "vllm bench", "doctor --model", "doctor -- ")

# Flags of `vllm serve` that cannot be used in the tests; the rest of the command runs.
DROPPED_FLAGS: dict[str, str] = {}
