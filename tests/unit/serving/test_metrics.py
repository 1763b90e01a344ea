# SPDX-License-Identifier: Apache-2.0
"""Metrics without a server; tests/engine/test_observability.py reads a server's metrics."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.exceptions import VLLMValidationError

from flashvlm_vllm.ipc.prompt_report import PromptReport
from flashvlm_vllm.ipc.worker_calls import CacheStatistics, SelectionTotals, WorkerStatistics
from flashvlm_vllm.request.budget import BudgetSource, Clamp, ItemCount
from flashvlm_vllm.request.refusal import Reason, Refusal
from flashvlm_vllm.serving import metrics, request_context


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


class Core:
    """The engines as seen by an API process: an identity each, and calls that may take long."""

    def __init__(self, *engines: Any) -> None:
        self.engines = engines
        self.core_engines = [number.to_bytes(2, "little") for number in range(len(engines))]

    async def _call_utility_async(self, method: str, *args: Any, engine: bytes) -> Any:
        assert method == "collective_rpc"
        answer = self.engines[int.from_bytes(engine, "little")]
        if isinstance(answer, Exception):
            raise answer
        if answer is None:
            await asyncio.sleep(60)
        return [answer]


def statistics(items: int) -> dict[str, Any]:
    cache = {"hits": items, "misses": 2 * items, "bytes": 100 * items}
    selection = {"flashvlm": {"seconds": items / 100, "items": items}}
    if items == 5:
        selection["uniform"] = {"seconds": 0.5, "items": 1}
    return {"selection": selection, "feature_cache": cache}


async def scrape(monkeypatch: pytest.MonkeyPatch, *engines: Any) -> None:
    config = SimpleNamespace(served_model_name="m", multimodal_config=SimpleNamespace())
    client = SimpleNamespace(engine_core=Core(*engines), model_config=config)
    monkeypatch.setattr(metrics.StatisticsOnScrape, "engine_client", client)
    monkeypatch.setattr(metrics, "_SCRAPE_TIMEOUT_SECONDS", 0.1)
    passed = []

    async def app(*_: Any) -> None:
        passed.append(True)

    middleware = metrics.StatisticsOnScrape(app)
    await middleware({"type": "http", "path": "/metrics"}, None, None)
    assert passed


async def test_every_engine_has_its_own_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    await scrape(monkeypatch, statistics(3), statistics(5))
    for engine, items in (("0", 3), ("1", 5)):
        labels = {"model_name": "m", "engine": engine}
        own = {**labels, "selector": "flashvlm"}
        assert value("flashvlm_selection_seconds_count", **own) == items
        assert value("flashvlm_selection_seconds_sum", **own) == items / 100
        assert value("flashvlm_feature_cache_hits", **labels) == items
        assert value("flashvlm_feature_cache_misses", **labels) == 2 * items
        assert value("flashvlm_feature_cache_bytes", **labels) == 100 * items
        assert value("flashvlm_feature_cache_limit_bytes", **labels) == 2**28


@pytest.mark.parametrize("second", [None, RuntimeError("dead")], ids=["late", "dead"])
async def test_an_engine_that_does_not_answer_is_counted_and_the_page_is_served(
    second: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scrape(monkeypatch, statistics(3), statistics(5))
    before = value("flashvlm_statistics_failures_total")
    await scrape(monkeypatch, statistics(4), second)
    assert value("flashvlm_statistics_failures_total") - before == 1
    own = {"model_name": "m", "engine": "1"}
    assert value("flashvlm_selection_seconds_count", **own, selector="flashvlm") == 5
    assert value("flashvlm_selection_seconds_count", **own, selector="uniform") == 1


@pytest.mark.parametrize(
    "reply",
    [
        {"selection": {}, "feature_cache": {"hits": 1, "misses": 1, "bytes": 1, "new": 1}},
        {"selection": {"flashvlm": {"seconds": 1.0, "items": 1, "new": 1}}, "feature_cache": None},
        {"selection": {}},
        "nothing",
    ],
)
async def test_a_malformed_reply_is_counted_and_the_page_is_served(
    reply: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = value("flashvlm_statistics_failures_total")
    await scrape(monkeypatch, reply)
    assert value("flashvlm_statistics_failures_total") - before == 1


def test_statistics_survive_serialisation() -> None:
    figures = WorkerStatistics({"uniform": SelectionTotals(0.5, 2)}, CacheStatistics(1, 2, 3))
    assert WorkerStatistics.unpacked(json.loads(json.dumps(figures.packed()))) == figures
    assert WorkerStatistics.unpacked(WorkerStatistics().packed()) == WorkerStatistics()


def test_items_are_counted_by_the_source_of_their_budget() -> None:
    asked = (BudgetSource.DEFAULT, "flashvlm", Clamp.MAX)
    items = (ItemCount(576, 64, "image", *asked), ItemCount(100, 64, "video", *asked))
    metrics.count_items("n", PromptReport(items, 64, is_default=True, selector="flashvlm"))
    whole = tuple(ItemCount(count.total, count.total, count.modality) for count in items)
    metrics.count_items("n", PromptReport(whole))
    for modality, total in (("image", 576), ("video", 100)):
        labels = {"model_name": "n", "modality": modality}
        assert value("flashvlm_visual_tokens_seen_total", **labels) == 2 * total
        assert value("flashvlm_visual_tokens_kept_total", **labels) == 64 + total
        for source, selector in (("default", "flashvlm"), ("none", "none")):
            own = {**labels, "budget": source, "selector": selector}
            assert value("flashvlm_visual_items_total", **own) == 1
        assert value("flashvlm_clamped_items_total", **labels, limit="max") == 1
        assert value("flashvlm_visual_budget_tokens_sum", **labels, budget="default") == 64
        share = value("flashvlm_visual_budget_ratio_sum", **labels, budget="default")
        assert share == pytest.approx(64 / total)
        assert value("flashvlm_visual_budget_tokens_count", **labels, budget="none") == 0


def test_refusal_reasons_are_valid_label_values() -> None:
    assert all(reason.value.replace("_", "").isalpha() for reason in Reason)
    error = Refusal(Reason.BELOW_FLOOR, "too few", parameter="visual_budget")
    assert error.reason is Reason.BELOW_FLOOR
    assert str(error) == "too few (parameter=visual_budget)"
    assert isinstance(error, VLLMValidationError)


def test_prompt_reports_are_recorded_for_the_current_request() -> None:
    report = PromptReport((ItemCount(576, 64),), 64, selector="flashvlm", fallible_items=("ab",))
    assert not request_context.record_prompts("m", [report], 1.0)  # only rendered
    with request_context.collecting() as collected:
        assert request_context.record_prompts("m", [report, report], 0.5)
        assert request_context.record_prompts("m", [], 0.25)
        request_context.record_refusal(Reason.SELECTOR_FAILED)
    assert collected.counts == [ItemCount(576, 64)] * 2
    assert collected.fallible_items == ["ab", "ab"]
    assert (collected.latest, collected.seconds) == (report, 0.75)
    assert collected.refused is Reason.SELECTOR_FAILED
