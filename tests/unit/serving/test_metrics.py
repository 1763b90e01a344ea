# SPDX-License-Identifier: Apache-2.0
"""Counting, without a server; tests/engine/test_observability.py reads a server's metrics."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.exceptions import VLLMValidationError

from flashvlm_vllm.ipc.prompt_report import PromptReport
from flashvlm_vllm.ipc.worker_calls import CacheStatistics, SelectionTotals, WorkerStatistics
from flashvlm_vllm.request.budget import ItemCount
from flashvlm_vllm.request.refusal import Reason, Refusal
from flashvlm_vllm.serving import metrics, request_context


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


class Core:
    """Engines as an API process sees them: an identity each, and calls that may take long."""

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


async def test_every_engine_has_its_own_figures(monkeypatch: pytest.MonkeyPatch) -> None:
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
async def test_an_engine_that_does_not_answer_is_counted_and_the_page_comes(
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
async def test_a_reply_of_another_form_is_counted_and_the_page_comes(
    reply: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = value("flashvlm_statistics_failures_total")
    await scrape(monkeypatch, reply)
    assert value("flashvlm_statistics_failures_total") - before == 1


def test_statistics_are_the_same_after_they_were_sent() -> None:
    figures = WorkerStatistics({"uniform": SelectionTotals(0.5, 2)}, CacheStatistics(1, 2, 3))
    assert WorkerStatistics.unpacked(json.loads(json.dumps(figures.packed()))) == figures
    assert WorkerStatistics.unpacked(WorkerStatistics().packed()) == WorkerStatistics()


def test_items_are_counted_by_where_their_budget_comes_from() -> None:
    items = (ItemCount(576, 64), ItemCount(100, 64, "video"))
    metrics.count_items("n", PromptReport(items, 64, is_default=True, selector="flashvlm"))
    whole = tuple(count._replace(kept=count.total) for count in items)
    metrics.count_items("n", PromptReport(whole))
    for modality, total in (("image", 576), ("video", 100)):
        labels = {"model_name": "n", "modality": modality}
        assert value("flashvlm_visual_tokens_seen_total", **labels) == 2 * total
        assert value("flashvlm_visual_tokens_kept_total", **labels) == 64 + total
        for source, selector in (("default", "flashvlm"), ("none", "none")):
            asked = {**labels, "budget": source, "selector": selector}
            assert value("flashvlm_visual_items_total", **asked) == 1
        assert value("flashvlm_visual_budget_tokens_sum", **labels, budget="default") == 64
        share = value("flashvlm_visual_budget_ratio_sum", **labels, budget="default")
        assert share == pytest.approx(64 / total)
        assert value("flashvlm_visual_budget_tokens_count", **labels, budget="none") == 0


def test_reasons_are_words_that_fit_a_label() -> None:
    assert all(reason.value.replace("_", "").isalpha() for reason in Reason)
    error = Refusal(Reason.BELOW_FLOOR, "too few", parameter="visual_budget")
    assert error.reason is Reason.BELOW_FLOOR
    assert str(error) == "too few (parameter=visual_budget)"
    assert isinstance(error, VLLMValidationError)


def test_what_is_noted_belongs_to_the_answer_in_the_making() -> None:
    told = PromptReport((ItemCount(576, 64),), 64, selector="flashvlm", third_party_items=("ab",))
    assert not request_context.record_prompts("m", [told], 1.0)  # only rendered
    with request_context.collecting() as collected:
        assert request_context.record_prompts("m", [told, told], 0.5)
        assert request_context.record_prompts("m", [], 0.25)
        request_context.record_refusal(Reason.SELECTOR_FAILED)
    assert collected.counts == [ItemCount(576, 64)] * 2
    assert collected.third_party_items == ["ab", "ab"]
    assert (collected.latest, collected.seconds) == (told, 0.75)
    assert collected.refused is Reason.SELECTOR_FAILED
