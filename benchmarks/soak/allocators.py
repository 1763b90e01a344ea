# SPDX-License-Identifier: Apache-2.0
"""Who hands out memory to a server of the soak: what the images under ``deploy/`` set."""

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
"""Where Debian has the library."""


class MissingAllocatorError(RuntimeError):
    """The library that should be preloaded is not there; the loader would go on without a word."""


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
