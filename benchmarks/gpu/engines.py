# SPDX-License-Identifier: Apache-2.0
"""Arguments of the engines and servers of this report, by what works on the machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.recorder import scratch

WORKING: Final = "working.json"
"""In the scratch folder: which compiled parts of vLLM the step `operators` saw work."""
CPU: Final = {"dtype": "float32", "enforce_eager": True, "block_size": 32}
"""The finest block of vLLM's attention on CPUs; its default there is 128."""


def working(folder: Path | None = None) -> dict[str, bool]:
    """Return the results of the step `operators`; empty if it did not run."""
    path = (folder or scratch()) / WORKING
    found: dict[str, bool] = json.loads(path.read_text()) if path.exists() else {}
    return found


def without_broken_parts(found: Mapping[str, bool]) -> dict[str, Any]:
    """Return engine arguments that leave out what does not work: Triton and native forms instead.

    Args:
        found: ``operators``, ``flash_attention``, ``compile``; what is not named works.

    """
    arguments: dict[str, Any] = {}
    if not found.get("flash_attention", True):
        arguments |= {"attention_backend": "TRITON_ATTN", "mm_encoder_attn_backend": "TORCH_SDPA"}
    if not found.get("operators", True):
        arguments |= {"compilation_config": {"custom_ops": ["none"]}}
    if not found.get("compile", True) or not found.get("operators", True):
        arguments |= {"enforce_eager": True}
    return arguments


def engine_arguments(kv_gib: float, *, on_gpu: bool, folder: Path | None = None) -> dict[str, Any]:
    """Return arguments of one of several engines on one GPU, or of one on a CPU.

    Args:
        kv_gib: KV cache on the GPU. It is given, not profiled: profiling sees what the other
            engines hold as well.
        on_gpu: whether there is a GPU.
        folder: the scratch folder.

    """
    if not on_gpu:
        return dict(CPU)
    return {
        "kv_cache_memory_bytes": int(kv_gib * 2**30),
        "gpu_memory_utilization": 0.02,  # only checked against what is free at start
        **without_broken_parts(working(folder)),
    }


def as_flags(arguments: Mapping[str, Any]) -> list[str]:
    """Return engine arguments as ``vllm serve`` takes them."""
    flags: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            flags.append(flag)
        elif value is False:
            flags.append("--no-" + flag.removeprefix("--"))
        elif isinstance(value, dict):
            flags += [flag, json.dumps(value)]
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        else:
            flags += [flag, str(value)]
    return flags
