# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a call, on the CPU and on CUDA."""

from __future__ import annotations

import ctypes
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
KEPT: Final = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1}
DEFAULT: Final = {M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 128 * 2**10}
"""Of glibc's `mallopt`: its manual page has the numbers."""

DEVICE: Final = "cuda" if torch.cuda.is_available() else "cpu"


def milliseconds(call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Time one call.

    On the CPU this is the time that the thread computed: torch has one thread here, so that is
    the wall clock without what other processes took of it.
    """
    if DEVICE == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        result = call(*arguments)
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop), result
    before = time.thread_time()
    result = call(*arguments)
    return 1e3 * (time.thread_time() - before), result


def median_ms(call: Callable[[], Any], repeats: int = 3, longest_ms: float = 1000) -> float:
    """Median of some calls; one alone when it takes longer. The first is not counted."""
    first, _ = milliseconds(call)
    if first > longest_ms:
        return first
    return statistics.median(milliseconds(call)[0] for _ in range(repeats))


@contextmanager
def memory_kept() -> Iterator[None]:
    """Keep freed memory within the process, as tcmalloc does, which vLLM recommends on a CPU.

    glibc returns every block above 32 MiB to the kernel and requests it again, page by page. Its
    thresholds no longer adapt themselves after this, so it comes last in a run.
    """
    libc = ctypes.CDLL(None)
    try:
        for setting, value in KEPT.items():
            libc.mallopt(setting, value)
        yield
    finally:
        for setting, value in DEFAULT.items():
            libc.mallopt(setting, value)
        libc.malloc_trim(0)


def peak_mib(call: Callable[[], Any]) -> float:
    """Return the peak memory of the tensors that a call creates, in MiB."""
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    memory = TensorMemory()
    with memory:
        call()
    return memory.peak / 2**20


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are made, as long as they live. Inputs do not count.

    Attributes:
        peak: most bytes at once.
        largest: bytes of the largest one.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.largest = self._now = 0
        self._alive: set[int] = set()
        self._inputs: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for tensor in _tensors(args):
            if (key := tensor.untyped_storage().data_ptr()) not in self._alive:
                self._inputs.add(key)
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self._alive or key in self._inputs:
            return
        self._alive.add(key)
        self._now += size
        self.largest = max(self.largest, size)
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._now -= size


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for each in value for tensor in _tensors(each)]
    return []
