# SPDX-License-Identifier: Apache-2.0
"""The GPU, the software and the commit that figures are of."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from benchmarks.measuring.commit import commit

PACKAGES: Final = ("vllm", "torch", "triton", "transformers", "flashvlm-vllm")


@dataclass(frozen=True)
class GPU:
    """The first GPU, as NVIDIA's management library describes it."""

    name: str
    memory_bytes: int
    free_bytes: int
    driver: str
    compute_capability: str


def find_gpu() -> GPU | None:
    """Return the first visible GPU without making a CUDA context; None where there is none."""
    from vllm.third_party import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, or no library of it
        return None
    try:
        if not pynvml.nvmlDeviceGetCount():
            return None
        handle = pynvml.nvmlDeviceGetHandleByIndex(_first_visible())
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        name = _text(pynvml.nvmlDeviceGetName(handle))
        return GPU(name, memory.total, memory.free, _driver(pynvml), f"{major}.{minor}")
    finally:
        pynvml.nvmlShutdown()


def _driver(pynvml: Any) -> str:
    try:
        return _text(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:  # some containers hide it
        return "unknown"


def _first_visible() -> int:
    """NVML ignores ``CUDA_VISIBLE_DEVICES``; an index in it is used here, a UUID is not."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    return int(first) if first.isdigit() else 0


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def describe(gpu: GPU | None, *, rehearsed: bool) -> dict[str, Any]:
    """Return the description of a run's machine for the results file."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "rehearsal": rehearsed,
        "gpu": gpu.name if gpu else None,
        "memory_gib": round(gpu.memory_bytes / 2**30, 1) if gpu else None,
        "driver": gpu.driver if gpu else None,
        "compute_capability": gpu.compute_capability if gpu else None,
        "cuda": _cuda(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "commit": commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cuda() -> str | None:
    import torch

    return torch.version.cuda
