# SPDX-License-Identifier: Apache-2.0
"""State of one request while vLLM's code handles it.

Token counts are computed when the prompt is rendered and needed when the response is built. vLLM's
code runs in between, so they are stored in a context variable of the request's task.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from flashvlm_vllm.ipc.prompt_report import PromptLayout, PromptReport
from flashvlm_vllm.request.budget import ItemCount
from flashvlm_vllm.request.refusal import Reason

Counts = list[ItemCount]
"""One entry per image or video."""


@dataclass
class Collected:
    """Data recorded for one request."""

    counts: Counts = field(default_factory=list)
    layouts: list[PromptLayout] = field(default_factory=list)
    """Layouts of the prompts with pruned items; final when a prompt is sent to the engine."""
    fallible_items: list[str] = field(default_factory=list)
    """Selection keys of items whose selection may have failed in the worker."""
    model: str | None = None
    """The served model's name; ``None`` until a prompt is rendered."""
    latest: PromptReport | None = None
    """Report of the last rendered prompt. All prompts of a request have the same budget and
    selector."""
    seconds: float = 0.0
    """Time spent rendering: fetching media, processing pixels, tokenizing prompts."""
    refused: Reason | None = None
    explain_id: str | None = None
    """Id of the request in the worker; set if the selection is to be explained."""


_collected: ContextVar[Collected | None] = ContextVar("flashvlm_visual_tokens", default=None)


@contextmanager
def collecting(explain_id: str | None = None) -> Iterator[Collected]:
    """Collect the data recorded inside the block."""
    collected = Collected(explain_id=explain_id)
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)


@contextmanager
def suppressed() -> Iterator[None]:
    """Record nothing inside the block, because a retried request is already recorded."""
    token = _collected.set(None)
    try:
        yield
    finally:
        _collected.reset(token)


def record_prompts(model: str, reports: Sequence[PromptReport], seconds: float) -> bool:
    """Record rendered prompts.

    Args:
        model: the served model's name.
        reports: reports of the prompts that a processor of this plugin handled.
        seconds: time spent rendering them.

    Returns:
        Whether the prompts belong to a request that will be answered.

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
        collected.fallible_items.extend(each.fallible_items)
        collected.latest = each
    return True


def record_refusal(reason: Reason) -> None:
    """Record that the request is refused."""
    collected = _collected.get()
    if collected is not None:
        collected.refused = reason


def explain_id() -> str | None:
    """Return the explain id of the request; ``None`` if it is not to be explained."""
    collected = _collected.get()
    return None if collected is None else collected.explain_id
