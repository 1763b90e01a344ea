# SPDX-License-Identifier: Apache-2.0
"""What the processor reports about a prompt's images and videos to the API endpoints."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from flashvlm_vllm.ipc.explain_request import ExplainRequest
from flashvlm_vllm.request.budget import ItemCount
from flashvlm_vllm.request.request_budget import RequestBudget
from flashvlm_vllm.request.visual_positions import VisualPositions

REPORT = "flashvlm_prompt_report"
"""Key of the ``PromptReport`` in a processed prompt."""
LAYOUT = "flashvlm_prompt_layout"
"""Key of the ``PromptLayout`` in a processed prompt."""

VIDEO_CHUNK = "video_chunk"
"""A part of a video that is an item of its own."""
KINDS = ("image", "video", VIDEO_CHUNK)
"""What items are to a client."""


def shown_kinds(counts: Sequence[ItemCount], *always: str) -> list[str]:
    """Return the kinds of which a prompt has items, and those that are always shown."""
    found = {each.modality for each in counts}
    return [each for each in KINDS if each in found or each in always]


class Layout(StrEnum):
    """Positions of a prompt's kept tokens."""

    KEPT = "kept"
    CLOSED = "closed"
    SHORTENED = "shortened"
    """Kept, with gaps shortened so that prompt and answer fit into the rotary table."""


class PromptLayout:
    """Layout of a prompt's kept tokens. Final once the length of the longest answer is known."""

    def __init__(self, positions: VisualPositions) -> None:
        self.result = Layout(positions)

    def shorten(self) -> None:
        """Record that gaps were shortened."""
        self.result = Layout.SHORTENED


@dataclass(frozen=True)
class PromptReport:
    """Token counts and settings of one prompt's images and videos."""

    counts: tuple[ItemCount, ...]
    """One entry per item whose size is known, images first."""
    budget: RequestBudget | None = None
    """The budget of the request, or the server's default; ``None``: no pruning."""
    is_default: bool = False
    """Whether the budget is the server's default, not the request's."""
    selector: str | None = None
    """The request's selector or the server's, if there is a budget."""
    fallible_items: tuple[str, ...] = ()
    """Selection keys, in hexadecimal, of items whose selection may fail: the selector is of another
    package, or the model is untested. Only the worker knows whether it succeeded."""
    explain: ExplainRequest | None = None
    """Set if the selection is to be explained and something is selected."""
    layout: PromptLayout | None = None
    """Set if something is pruned."""
