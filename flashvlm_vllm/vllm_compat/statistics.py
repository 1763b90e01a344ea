# SPDX-License-Identifier: Apache-2.0
"""Wraps vLLM's statistics: counts waiting requests for budgets under load."""

from typing import Any, Final

from flashvlm_vllm.vllm_compat.wrap import Wrap


def _record(original: Any, manager: Any, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
    original(manager, scheduler_stats, *args, **kwargs)
    if scheduler_stats is not None:
        from flashvlm_vllm.serving.waiting import WAITING

        WAITING.report(kwargs.get("engine_idx") or 0, scheduler_stats.num_waiting_reqs)


WRAPS: Final = (
    Wrap(
        "vllm.v1.metrics.loggers:StatLoggerManager.record",
        "Budgets under load depend on the number of waiting requests, which the API process gets "
        "here only. A stat logger plugin would turn on statistics that --disable-log-stats turns "
        "off.",
        "0.32",
        "An engine client returns the number of waiting requests.",
        wrapper=_record,
    ),
)
