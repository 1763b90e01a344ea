# SPDX-License-Identifier: Apache-2.0
"""What is exchanged in a page's commands so that they run here. Everything else runs as written.

The commands that cannot run here at all are in ``stand_in.py``.
"""

from collections.abc import Callable
from pathlib import Path

from testing.tiny.internvl import build_internvl_hf
from testing.tiny.llava import build_llava
from testing.tiny.onevision import build_onevision
from testing.tiny.qwen3_vl import build_qwen3_vl
from testing.tiny.qwen_vl import build_qwen_vl

# A published checkpoint: the small one with random weights that takes its place, and its folder.
MODELS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "llava-hf/llava-1.5-7b-hf": ("llava-clip", build_llava),
    "llava-hf/llava-v1.6-vicuna-7b-hf": ("llava-next", lambda path: build_llava(path, next=True)),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": ("onevision", build_onevision),
    "Qwen/Qwen2.5-VL-7B-Instruct": ("qwen2.5-vl", lambda path: build_qwen_vl(path, "2.5")),
    "Qwen/Qwen3-VL-8B-Instruct": ("qwen3-vl", build_qwen3_vl),
    "OpenGVLab/InternVL3-8B-hf": ("internvl-hf", build_internvl_hf),
}

# Files that a reader is told to bring: drawn into the folder that the page runs in.
PHOTOS = ("photo.jpg", "other.jpg", "page.png")
CLIP = "clip.mp4"

SERVER = "localhost:8000"  # becomes the port of the page's server
PICTURES = "https://example.com/"  # becomes a server of those files

# Other text. What vLLM needs on two CPU cores, as testing.server adds to `vllm serve`.
TEXT = {
    "LLM(model=": 'LLM(dtype="float32", enforce_eager=True, max_num_seqs=8, model=',
}

# The server that most pages talk to is started once. Another one takes too long for the quick
# tests, and so does a block with one of these words: engines of its own, vLLM's parser again.
SHARED_SERVER = ("llava-hf/llava-1.5-7b-hf", "--plugins", "flashvlm")
SLOW = ("LLM(", "vllm run-batch", "vllm bench", "doctor --model", "doctor -- ")

# Flags of `vllm serve` that need what is not here; the rest of the command runs.
DROPPED_FLAGS: dict[str, str] = {}
