# SPDX-License-Identifier: Apache-2.0
"""Calls from the API process to the workers of every engine, and their replies.

vLLM sends arguments and replies as numbers, strings, lists and dictionaries. This module converts
them from and to types. The worker methods are in `vllm_compat.worker_methods`.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from flashvlm_vllm.ipc.explain_request import ItemRecord


class WorkerMethod(StrEnum):
    """Names of the worker methods."""

    STATISTICS = "flashvlm_statistics"
    SELECTOR_FAILURES = "flashvlm_selector_failures"
    CLEAR_CACHES = "flashvlm_clear_caches"
    START_EXPLAINING = "flashvlm_start_explaining"
    TAKE_EXPLANATION = "flashvlm_take_explanation"


@dataclass
class SelectionTotals:
    """Totals of one selector since the worker started."""

    seconds: float = 0.0
    items: int = 0
    """Number of images and videos."""


@dataclass(frozen=True)
class CacheStatistics:
    """State of a worker's feature cache."""

    hits: int = 0
    """Images and videos since the worker started whose features were cached."""
    misses: int = 0
    """Images and videos since the worker started that the vision tower encoded."""
    bytes: int = 0
    """Bytes stored now."""


@dataclass(frozen=True)
class WorkerStatistics:
    """Statistics of one rank."""

    selection: Mapping[str, SelectionTotals] = field(default_factory=dict)
    """Totals by selector."""
    feature_cache: CacheStatistics | None = None
    """``None`` if the model is not covered."""

    def packed(self) -> dict[str, Any]:
        """Return the statistics as a dictionary that vLLM can serialize."""
        return asdict(self)

    @classmethod
    def unpacked(cls, reply: Mapping[str, Any]) -> "WorkerStatistics":
        """Restore statistics from the result of `packed`.

        Raises:
            KeyError, TypeError: the reply does not have that form.

        """
        cache = reply["feature_cache"]
        return cls(
            {name: SelectionTotals(**totals) for name, totals in reply["selection"].items()},
            None if cache is None else CacheStatistics(**cache),
        )


async def read_statistics(client: Any) -> dict[int, list[WorkerStatistics]]:
    """Return the statistics of the ranks of each engine, by engine number."""
    replies = await _call(client, WorkerMethod.STATISTICS)
    return {
        engine: [WorkerStatistics.unpacked(each) for each in ranks]
        for engine, ranks in replies.items()
    }


async def find_selector_failures(client: Any, selection_keys: Sequence[str]) -> dict[str, str]:
    """Return the error messages of failed selections, by selection key."""
    replies = await _call(client, WorkerMethod.SELECTOR_FAILURES, list(selection_keys))
    return {
        key: message
        for ranks in replies.values()
        for failed in ranks
        for key, message in failed.items()
    }


async def start_explaining(
    client: Any, explain_id: str, questions: Mapping[str, Sequence[int]]
) -> None:
    """Have the workers record the selections of some items.

    Args:
        client: the API process's engine client.
        explain_id: id of the request, see ``VisualRequest.explain_id``.
        questions: token ids of the words to score each item with, by selection key in hexadecimal.

    """
    # In all engines, because it is not known which of them will run the request.
    await _call(
        client,
        WorkerMethod.START_EXPLAINING,
        explain_id,
        {key: list(ids) for key, ids in questions.items()},
    )


async def take_explanation(client: Any, explain_id: str) -> dict[str, ItemRecord]:
    """Stop recording for a request and return its records, by selection key."""
    replies = await _call(client, WorkerMethod.TAKE_EXPLANATION, explain_id)
    # Only the first rank of the engine that ran the request has records.
    records: dict[str, Any] = next(
        (each for ranks in replies.values() for each in ranks if each), {}
    )
    return {key: ItemRecord.unpacked(each) for key, each in records.items()}


async def _call(client: Any, method: WorkerMethod, *args: Any) -> dict[int, list[Any]]:
    """Call a worker method in every engine; return the ranks' replies by engine number.

    ``AsyncLLM.collective_rpc`` is not used: with several engines (``--data-parallel-size``) it
    calls all of them, but returns the replies of the first one only.
    """
    core = client.engine_core
    engines = list(core.core_engines)
    replies = await asyncio.gather(
        *(
            core._call_utility_async(
                "collective_rpc", method.value, None, args, None, engine=engine
            )
            for engine in engines
        )
    )
    numbers = [int.from_bytes(engine, "little") for engine in engines]
    return dict(zip(numbers, replies, strict=True))
