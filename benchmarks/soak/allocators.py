# SPDX-License-Identifier: Apache-2.0
"""The memory allocators of the images under ``deploy/``."""

import ctypes.util
from collections.abc import Mapping
from typing import Final

GLIBC: Final = "glibc"
JEMALLOC: Final = "jemalloc"
ALLOCATORS: Final[Mapping[str, Mapping[str, str]]] = {
    GLIBC: {  # Dockerfile
        "MALLOC_ARENA_MAX": "2",
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        "MALLOC_TRIM_THRESHOLD_": "1048576",
    },
    JEMALLOC: {  # Dockerfile.cpu
        "LD_PRELOAD": "libjemalloc.so.2",
        "MALLOC_CONF": "background_thread:true,dirty_decay_ms:5000",
    },
}
"""Environment variables by allocator."""
PACKAGE: Final = "libjemalloc2"
"""Debian's package with the library."""


class MissingAllocatorError(RuntimeError):
    """The library to preload is not installed; the loader would only print a warning."""


def variables(allocator: str) -> Mapping[str, str]:
    """Return the environment variables of an allocator.

    Args:
        allocator: One of ``ALLOCATORS``.

    Raises:
        MissingAllocatorError: The library is not installed.
    """
    if allocator != GLIBC and ctypes.util.find_library(allocator) is None:
        raise MissingAllocatorError(
            f"{allocator} is not installed: apt-get install {PACKAGE}, or --allocator {GLIBC}"
        )
    return ALLOCATORS[allocator]
