# SPDX-License-Identifier: Apache-2.0
"""Reads a server's ``/metrics``."""

import math
import threading
from types import TracebackType
from typing import Final
from urllib.request import urlopen

from demo.measure import Sample, samples

RUNNING: Final = "vllm:num_requests_running"
PREEMPTIONS: Final = "vllm:num_preemptions_total"
PROMPT_TOKENS: Final = "vllm:request_prompt_tokens_sum"
REQUESTS: Final = "vllm:request_prompt_tokens_count"
CACHE_CONFIG: Final = "vllm:cache_config_info"


class MetricsError(RuntimeError):
    """The server does not have a metric."""


def page(url: str) -> dict[str, Sample]:
    """Return the metrics of a server with one engine."""
    with urlopen(f"{url}/metrics", timeout=30) as response:
        return samples(response.read().decode())


def value(found: dict[str, Sample], name: str) -> float:
    """Return the value of a metric."""
    if name not in found:
        raise MetricsError(f"the server has no {name}")
    return found[name][0]


def kv_blocks(found: dict[str, Sample]) -> tuple[int, int]:
    """Return the number of KV blocks for requests, and the tokens of a block."""
    value(found, CACHE_CONFIG)
    labels = found[CACHE_CONFIG][1]
    # One is vLLM's null block, which is never given out.
    return int(labels["num_gpu_blocks"]) - 1, int(labels["block_size"])


def blocks_per_request(tokens: float, block_size: int) -> int:
    """Return the KV blocks of a finished request with ``tokens`` tokens, prompt and output."""
    return math.ceil(tokens / block_size)


class Peak:
    """The most requests that ran at once during the ``with`` block.

    Reading the metrics takes time of the server, so nothing is timed in the block.
    """

    def __init__(self, url: str, every: float = 0.25) -> None:
        self.running = 0
        self._url = url
        self._every = every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        while not self._over.wait(self._every):
            self.running = max(self.running, int(value(page(self._url), RUNNING)))

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
