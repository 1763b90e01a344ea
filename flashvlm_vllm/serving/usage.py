# SPDX-License-Identifier: Apache-2.0
"""``usage.visual_tokens`` in a response: visual tokens of its images and videos, and kept ones."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from flashvlm_vllm.ipc.prompt_report import Layout, PromptLayout, shown_kinds
from flashvlm_vllm.request.budget import BudgetSource
from flashvlm_vllm.serving.request_context import Collected, Counts

FIELD = "visual_tokens"


def summary(counts: Counts, layouts: Sequence[PromptLayout] = ()) -> dict[str, Any]:
    """Return the content of ``usage.visual_tokens``.

    Args:
        counts: token counts, one per image or video.
        layouts: layouts of the prompts with pruned items.

    """
    payload: dict[str, Any] = {
        "total": sum(count.total for count in counts),
        "kept": sum(count.kept for count in counts),
    }
    for kind in shown_kinds(counts, "image"):
        payload[f"{kind}s"] = [
            {"total": count.total, "kept": count.kept}
            | ({} if count.clamped is None else {"clamped": str(count.clamped)})
            for count in counts
            if count.modality == kind
        ]
    if any(count.source is BudgetSource.UNDER_LOAD for count in counts):
        payload["under_load"] = True
    if layouts:
        results = [each.result for each in layouts]
        shortened = Layout.SHORTENED
        payload["positions"] = str(shortened if shortened in results else results[-1])
    return payload


def annotated(answer: Any, collected: Collected) -> Any:
    """Add ``visual_tokens`` to a response's ``usage``.

    Args:
        answer: the result of a vLLM handler: a response model, an error (left unchanged), or an
            async iterator of server-sent events (strings) or event models.
        collected: data recorded for the request; without images the response is left unchanged.

    """
    if not collected.counts:
        return answer
    if isinstance(answer, AsyncIterator):
        return _annotated_stream(answer, collected)
    _annotate_usage(answer, collected)
    return answer


async def _annotated_stream(stream: AsyncIterator[Any], collected: Collected) -> AsyncIterator[Any]:
    async for event in stream:
        if isinstance(event, str):
            yield _annotated_event(event, collected)
        else:
            response = getattr(event, "response", None)
            if response is not None:
                _annotate_usage(response, collected)
            yield event


def _annotate_usage(answer: Any, collected: Collected) -> None:
    usage = getattr(answer, "usage", None)
    if usage is not None:
        setattr(usage, FIELD, summary(collected.counts, collected.layouts))


def _annotated_event(event: str, collected: Collected) -> str:
    # Only the last event has usage (with continuous_usage_stats all events have it).
    if '"usage":{' not in event:
        return event
    return event_with_counts(event, summary(collected.counts, collected.layouts))


def event_with_counts(event: str, counts: Any) -> str:
    """Return a server-sent event with the counts in its usage; unchanged if it has no usage.

    Args:
        event: of a chat completion or of Anthropic's Messages API.
        counts: the content of ``usage.visual_tokens``.

    """
    before, _, text = event.partition("data: ")
    data = json.loads(text)
    # The first event of Anthropic's streams has its usage in a message.
    usage = data.get("message", data).get("usage")
    if usage is None:
        return event
    usage[FIELD] = counts
    return f"{before}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
