# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of this plugin on ``/metrics``.

Counters and histograms are updated in the API process that serves a request; vLLM sums them over
its API processes. Statistics of workers are read from every engine at each scrape.

The number of label values is bounded, whatever clients send: served models, ``image`` and
``video``, installed selectors, engines, and the reasons in ``request.refusal``.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.logger import init_logger

from flashvlm_vllm.ipc.prompt_report import PromptReport
from flashvlm_vllm.ipc.worker_calls import SelectionTotals, WorkerStatistics, read_statistics
from flashvlm_vllm.request.refusal import Reason
from flashvlm_vllm.request.selector_name import DEFAULT_SELECTOR
from flashvlm_vllm.settings import settings_of

logger = init_logger("vllm.flashvlm")  # vLLM configures only its own loggers

_SCRAPE_TIMEOUT_SECONDS = 2.0
_TOKENS = (1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192, 16384)
"""Histogram buckets that cover the paper's budgets, whole images of LLaVA (576 tokens) and
LLaVA-NeXT (2880), and long videos."""
_SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75, 0.99, 1.0)
"""Histogram buckets; above 0.99 a budget did not remove tokens."""

_SEEN = Counter(
    "flashvlm_visual_tokens_seen",
    "Visual tokens of the images and videos in requests, before selection.",
    ["model_name", "modality"],
)
_KEPT = Counter(
    "flashvlm_visual_tokens_kept",
    "Visual tokens that were kept, for which KV cache was allocated.",
    ["model_name", "modality"],
)
_ASKED = Counter(
    "flashvlm_visual_items",
    "Images and videos in requests, by the source of their budget (request, default, under_load, "
    "none) and by selector (none without a budget).",
    ["model_name", "modality", "budget", "selector"],
)
_CLAMPED = Counter(
    "flashvlm_clamped_items",
    "Images and videos whose budget was replaced by the server's limit (min, max).",
    ["model_name", "modality", "limit"],
)
_BUDGET_TOKENS = Histogram(
    "flashvlm_visual_budget_tokens",
    "Budget of an image or video in tokens: fractions converted, at most all of its tokens.",
    ["model_name", "modality", "budget"],
    buckets=_TOKENS,
)
_BUDGET_SHARE = Histogram(
    "flashvlm_visual_budget_ratio",
    "Budget of an image or video as a share of its tokens; 1 if the budget removed no tokens.",
    ["model_name", "modality", "budget"],
    buckets=_SHARES,
)
_REFUSALS = Counter(
    "flashvlm_refusals",
    "Requests that were refused, or that failed because a selector failed, by reason.",
    ["reason"],
)
for _reason in Reason:
    # Initialize all reasons to 0, so that the first refusal shows as an increase.
    _REFUSALS.labels(_reason.value)
_FAILED_SCRAPES = Counter(
    "flashvlm_statistics_failures",
    "Scrapes at which an engine did not reply in time, so that its worker statistics are stale.",
)


def _of_engine(name: str, documentation: str, *labels: str) -> Gauge:
    return Gauge(
        name, documentation, ["model_name", "engine", *labels], multiprocess_mode="mostrecent"
    )


# Totals since the worker started, copied from it at each scrape; therefore gauges.
_SECONDS = _of_engine(
    "flashvlm_selection_seconds_sum",
    "Seconds spent selecting visual tokens since the worker started, by selector.",
    "selector",
)
_ITEMS = _of_engine(
    "flashvlm_selection_seconds_count",
    "Images and videos whose visual tokens were selected since the worker started, by selector.",
    "selector",
)
_CACHE_HITS = _of_engine(
    "flashvlm_feature_cache_hits",
    "Images and videos with a budget since the worker started whose features were cached.",
)
_CACHE_MISSES = _of_engine(
    "flashvlm_feature_cache_misses",
    "Images and videos with a budget since the worker started that the vision tower encoded.",
)
_CACHE_BYTES = _of_engine(
    "flashvlm_feature_cache_bytes",
    "Bytes in use by the feature cache of each worker.",
)
_CACHE_LIMIT = _of_engine(
    "flashvlm_feature_cache_limit_bytes",
    "Size limit of the feature cache in bytes (--visual-feature-cache-gb).",
)


def count_items(model_name: str, report: PromptReport) -> None:
    """Count one prompt's images and videos."""
    for count in report.counts:
        labels = (model_name, count.modality)
        source = count.source or "none"
        _SEEN.labels(*labels).inc(count.total)
        _KEPT.labels(*labels).inc(count.kept)
        _ASKED.labels(*labels, source, count.selector or "none").inc()
        if count.clamped is not None:
            _CLAMPED.labels(*labels, count.clamped).inc()
        if count.source is not None:
            _BUDGET_TOKENS.labels(*labels, source).observe(count.kept)
            _BUDGET_SHARE.labels(*labels, source).observe(count.kept / count.total)


def count_refusal(reason: Reason) -> None:
    """Count a refused request."""
    _REFUSALS.labels(reason.value).inc()


class StatisticsOnScrape:
    """ASGI middleware that updates worker statistics before ``/metrics`` is served."""

    engine_client: Any = None

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Update the statistics on a scrape; pass every request on."""
        if scope["type"] == "http" and scope["path"].rstrip("/") == "/metrics":
            await self._refresh()
        await self.app(scope, receive, send)

    async def _refresh(self) -> None:
        if self.engine_client is None:
            return
        try:
            engines = await asyncio.wait_for(
                read_statistics(self.engine_client), _SCRAPE_TIMEOUT_SECONDS
            )
            for number, ranks in engines.items():
                _set_gauges(self.engine_client.model_config, number, ranks)
        # A scrape must succeed in any state of the engine; the last known values are kept.
        except Exception as error:
            _FAILED_SCRAPES.inc()
            logger.debug("flashvlm: no statistics from the workers: %s", type(error).__name__)


def _set_gauges(model_config: Any, engine: int, ranks: Sequence[WorkerStatistics]) -> None:
    labels = (model_config.served_model_name, str(engine))
    _CACHE_LIMIT.labels(*labels).set(settings_of(model_config).feature_cache_bytes)
    # Include the default selector from the start, so that its first image shows as an increase.
    for selector in {DEFAULT_SELECTOR, *(name for rank in ranks for name in rank.selection)}:
        own = [rank.selection.get(selector, SelectionTotals()) for rank in ranks]
        _SECONDS.labels(*labels, selector).set(sum(each.seconds for each in own))
        _ITEMS.labels(*labels, selector).set(sum(each.items for each in own))
    # All ranks have the same feature cache statistics.
    cache = ranks[0].feature_cache
    if cache is not None:
        _CACHE_HITS.labels(*labels).set(cache.hits)
        _CACHE_MISSES.labels(*labels).set(cache.misses)
        _CACHE_BYTES.labels(*labels).set(cache.bytes)
