# SPDX-License-Identifier: Apache-2.0
"""What ``/metrics`` tells about pruning."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.logger import init_logger

from flashvlm_vllm.budget import ItemCount

logger = init_logger("vllm.flashvlm")  # vLLM shows its own name space only

WORKER_METHOD = "flashvlm_statistics"
"""Name of the worker method that ``compat`` installs and scrapes call."""

_SCRAPE_TIMEOUT_SECONDS = 2.0

_SEEN = Counter(
    "flashvlm_visual_tokens_seen",
    "Visual tokens of the images and videos in requests, before selection.",
    ["model_name", "modality"],
)
_KEPT = Counter(
    "flashvlm_visual_tokens_kept",
    "Visual tokens that were kept and given KV cache.",
    ["model_name", "modality"],
)
# Totals since the worker started, mirrored from it at each scrape; hence gauges.
_SECONDS = Gauge(
    "flashvlm_selection_seconds_sum",
    "Seconds spent on selecting visual tokens since the worker started.",
    multiprocess_mode="mostrecent",
)
_ITEMS = Gauge(
    "flashvlm_selection_seconds_count",
    "Images and videos whose visual tokens were selected since the worker started.",
    multiprocess_mode="mostrecent",
)
_CACHE = {
    "hits": Gauge(
        "flashvlm_feature_cache_hits",
        "Images and videos with a budget whose features were at hand since the worker started.",
        multiprocess_mode="mostrecent",
    ),
    "misses": Gauge(
        "flashvlm_feature_cache_misses",
        "Images and videos with a budget that the vision tower saw since the worker started.",
        multiprocess_mode="mostrecent",
    ),
    "bytes": Gauge(
        "flashvlm_feature_cache_bytes",
        "Bytes that the cache of visual features holds in the worker.",
        multiprocess_mode="mostrecent",
    ),
}


def count_tokens(model_name: str, counts: Sequence[ItemCount]) -> None:
    """Add one prompt's images and videos."""
    for count in counts:
        _SEEN.labels(model_name, count.modality).inc(count.total)
        _KEPT.labels(model_name, count.modality).inc(count.kept)


class StatisticsOnScrape:
    """ASGI middleware: brings the worker's figures up to date before ``/metrics``."""

    engine_client: Any = None

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Refresh on a scrape, pass everything through."""
        if scope["type"] == "http" and scope["path"].rstrip("/") == "/metrics":
            await self._refresh()
        await self.app(scope, receive, send)

    async def _refresh(self) -> None:
        if self.engine_client is None:
            return
        try:
            ranks = await asyncio.wait_for(
                self.engine_client.collective_rpc(WORKER_METHOD), _SCRAPE_TIMEOUT_SECONDS
            )
        # A scrape must answer whatever state the engine is in; the last known value stays.
        except Exception as error:
            logger.debug("flashvlm: no statistics from the worker: %s", error)
            return
        _SECONDS.set(sum(rank["selection"]["seconds"] for rank in ranks))
        _ITEMS.set(sum(rank["selection"]["items"] for rank in ranks))
        # Every rank holds the same.
        for name, value in ranks[0]["feature_cache"].items():
            _CACHE[name].set(value)
