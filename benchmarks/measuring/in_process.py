# SPDX-License-Identifier: Apache-2.0
"""An offline engine in the process of the benchmark."""

from typing import Final

ENVIRONMENT: Final = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_PLUGINS": "flashvlm",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Environment of an engine whose parts can be timed in this process."""
