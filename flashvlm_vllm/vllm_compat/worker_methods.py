# SPDX-License-Identifier: Apache-2.0
"""Adds worker methods that the API process calls by name; the calls are in `ipc.worker_calls`."""

from collections.abc import Callable
from typing import Any, Final

from flashvlm_vllm.ipc.worker_calls import WorkerMethod, WorkerStatistics
from flashvlm_vllm.vllm_compat.wrap import Entry, Wrap


def _reset_encoder_cache(original: Any, executor: Any) -> None:
    original(executor)
    executor.collective_rpc(WorkerMethod.CLEAR_CACHES.value)


def _clear_caches(worker: Any) -> None:
    clear = getattr(worker.get_model(), "clear_caches", None)
    if clear is not None:
        clear()


def _statistics(worker: Any) -> dict[str, Any]:
    from flashvlm_vllm.worker.selection_clock import SELECTION_CLOCK

    cache = getattr(worker.get_model(), "feature_cache", None)
    return WorkerStatistics(
        SELECTION_CLOCK.read(), None if cache is None else cache.read()
    ).packed()


def _selector_failures(worker: Any, selection_keys: list[str]) -> dict[str, str]:
    from flashvlm_vllm.worker.selector_failures import SELECTOR_FAILURES

    return SELECTOR_FAILURES.among(selection_keys)


def _start_explaining(_: Any, explain_id: str, questions: dict[str, list[int]]) -> None:
    from flashvlm_vllm.worker.explain_watches import EXPLAIN_WATCHES

    EXPLAIN_WATCHES.add(explain_id, questions)


def _take_explanation(_: Any, explain_id: str) -> dict[str, Any]:
    from flashvlm_vllm.worker.explain_watches import EXPLAIN_WATCHES

    return {key: each.packed() for key, each in EXPLAIN_WATCHES.take(explain_id).items()}


METHODS: Final[dict[WorkerMethod, Callable[..., Any]]] = {
    WorkerMethod.STATISTICS: _statistics,
    WorkerMethod.SELECTOR_FAILURES: _selector_failures,
    WorkerMethod.CLEAR_CACHES: _clear_caches,
    WorkerMethod.START_EXPLAINING: _start_explaining,
    WorkerMethod.TAKE_EXPLANATION: _take_explanation,
}


def add_to_workers() -> None:
    """Add the methods to the base class of vLLM's workers."""
    from vllm.v1.worker.worker_base import WorkerBase

    for name, method in METHODS.items():
        setattr(WorkerBase, name.value, method)


WRAPS: Final = (
    Wrap(
        "vllm.v1.executor.abstract:Executor.reset_encoder_cache",
        "Resetting the encoder cache (usually after new weights) must also clear this plugin's "
        "feature cache; vLLM does not notify the model.",
        "0.32",
        "vLLM notifies models.",
        wrapper=_reset_encoder_cache,
    ),
)

ADDITIONS: Final = (
    Entry(
        "vllm.v1.worker.worker_base:WorkerBase",
        "collective_rpc calls worker methods by name without pickling code; the plugin adds five "
        "with names that start with flashvlm_.",
        "0.32",
        "vLLM has a channel for metrics of workers.",
    ),
)
