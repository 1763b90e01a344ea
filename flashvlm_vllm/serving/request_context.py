# SPDX-License-Identifier: Apache-2.0
"""State of one request on its way through vLLM's own code.

The counts are known where the prompt is rendered and needed where the answer is built. Between the
two lies vLLM's code, so they travel in a context variable of the request's task.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from flashvlm_vllm.ipc.prompt_report import PromptLayout, PromptReport
from flashvlm_vllm.request.budget import ItemCount
from flashvlm_vllm.request.refusal import Reason

Counts = list[ItemCount]
"""One per image or video."""


@dataclass
class Collected:
    """What is recorded of one request."""

    counts: Counts = field(default_factory=list)
    layouts: list[PromptLayout] = field(default_factory=list)
    """Of the prompts with pruned items; settled when they reach the engine."""
    third_party_items: list[str] = field(default_factory=list)
    """Selection keys of items whose selection may have failed in the worker."""
    model: str | None = None
    """The served model's name; ``None`` until something is rendered."""
    latest: PromptReport | None = None
    """Of the prompt rendered last: a request's prompts share budget and selector."""
    seconds: float = 0.0
    """Spent on rendering: media fetched, pixels processed, prompts tokenized."""
    refused: Reason | None = None
    explain_id: str | None = None
    """Set where the selection is to be explained: the request's name in the worker."""


_collected: ContextVar[Collected | None] = ContextVar("flashvlm_visual_tokens", default=None)


@contextmanager
def collecting(explain_id: str | None = None) -> Iterator[Collected]:
    """Collect what is recorded inside the block."""
    collected = Collected(explain_id=explain_id)
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)


@contextmanager
def suppressed() -> Iterator[None]:
    """Record nothing inside the block; a retried request is recorded already."""
    token = _collected.set(None)
    try:
        yield
    finally:
        _collected.reset(token)


def record_prompts(model: str, reports: Sequence[PromptReport], seconds: float) -> bool:
    """Record rendered prompts.

    Args:
        model: the served model's name.
        reports: of the prompts that went through a processor of this plugin.
        seconds: that rendering them took.

    Returns:
        whether an answer is being built from them.

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
        collected.third_party_items.extend(each.third_party_items)
        collected.latest = each
    return True


def record_refusal(reason: Reason) -> None:
    """Record that the request is refused."""
    collected = _collected.get()
    if collected is not None:
        collected.refused = reason


def explain_id() -> str | None:
    """Return the name under which the selection is to be explained, if it is."""
    collected = _collected.get()
    return None if collected is None else collected.explain_id
