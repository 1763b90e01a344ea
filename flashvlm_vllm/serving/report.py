# SPDX-License-Identifier: Apache-2.0
"""Tells the client how many visual tokens its images and videos had and how many were kept.

The numbers are known where the prompt is rendered, and wanted where the answer is built; in
between lies vLLM's own code, so they travel in a context variable of the request's task.
"""

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from flashvlm_vllm.budget import ItemCount
from flashvlm_vllm.fields import MODALITIES
from flashvlm_vllm.refusal import Reason
from flashvlm_vllm.visual_report import Layout, PromptLayout, VisualReport

FIELD = "visual_tokens"

Counts = list[ItemCount]
"""One per image or video."""


@dataclass
class Collected:
    """What was noted while one answer was in the making."""

    counts: Counts = field(default_factory=list)
    layouts: list[PromptLayout] = field(default_factory=list)
    """Of the prompts with pruned items; settled when they reach the engine."""
    unproven: list[str] = field(default_factory=list)
    """Identities of images whose selection may have failed in the worker."""
    model: str | None = None
    """The served model's name; ``None`` until something is rendered."""
    latest: VisualReport | None = None
    """Of the prompt rendered last: a request's prompts share budget and selector."""
    seconds: float = 0.0
    """Spent on rendering: media fetched, pixels processed, prompts tokenized."""
    refused: Reason | None = None
    witness: str | None = None
    """Set by who wants the selection explained: the request's name in the worker."""


_collected: ContextVar[Collected | None] = ContextVar("flashvlm_visual_tokens", default=None)


@contextmanager
def collecting(witness: str | None = None) -> Iterator[Collected]:
    """Collect what ``note`` is told inside the block."""
    collected = Collected(witness=witness)
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)


@contextmanager
def unnoticed() -> Iterator[None]:
    """Have nothing noted inside the block: what is done there was noted before."""
    token = _collected.set(None)
    try:
        yield
    finally:
        _collected.reset(token)


def note(model: str, reports: Sequence[VisualReport], seconds: float) -> bool:
    """Remember what rendered prompts cost; tells whether an answer is being built of them.

    Args:
        model: the served model's name.
        reports: of the prompts that went through a processor of this plugin.
        seconds: that rendering them took.

    """
    collected = _collected.get()
    if collected is None:
        return False
    collected.model = model
    collected.seconds += seconds
    for each in reports:
        collected.counts.extend(each.counts)
        if each.layout is not None:
            collected.layouts.append(each.layout)
        collected.unproven.extend(each.unproven)
        collected.latest = each
    return True


def note_refusal(reason: Reason) -> None:
    """Remember that no answer comes, if one was being built."""
    collected = _collected.get()
    if collected is not None:
        collected.refused = reason


def witness() -> str | None:
    """Return the name under which the selection is to be explained, if it is."""
    collected = _collected.get()
    return None if collected is None else collected.witness


def summary(counts: Counts, layouts: Sequence[PromptLayout] = ()) -> dict[str, Any]:
    """Return what ``usage.visual_tokens`` holds.

    Args:
        counts: one per image or video.
        layouts: of the prompts with pruned items.

    """
    told: dict[str, Any] = {
        "total": sum(count.total for count in counts),
        "kept": sum(count.kept for count in counts),
    }
    for modality in MODALITIES:
        items = [
            {"total": count.total, "kept": count.kept}
            for count in counts
            if count.modality == modality
        ]
        if items or modality == "image":
            told[f"{modality}s"] = items
    if layouts:
        results = [each.result for each in layouts]
        shortened = Layout.SHORTENED
        told["positions"] = str(shortened if shortened in results else results[-1])
    return told


def annotated(answer: Any, collected: Collected) -> Any:
    """Add what was collected to an answer's ``usage``.

    Args:
        answer: what a vLLM handler returned: a response model, an error (left alone), or an
            async iterator of server-sent events (strings) or event models.
        collected: its counts are filled by now; an answer to a request without images is left
            alone.

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
    # Only the closing event carries usage (all do with continuous_usage_stats).
    if '"usage":{' not in event or not event.startswith("data: "):
        return event
    data = json.loads(event.removeprefix("data: "))
    data["usage"][FIELD] = summary(collected.counts, collected.layouts)
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
