# SPDX-License-Identifier: Apache-2.0
"""What the processor reports of a prompt's images and videos to the endpoints."""

from dataclasses import dataclass
from enum import StrEnum

from flashvlm_vllm.ipc.explain_request import ExplainRequest
from flashvlm_vllm.request.budget import Budget, ItemCount
from flashvlm_vllm.request.visual_positions import VisualPositions

REPORT = "flashvlm_prompt_report"
"""Key of a processed prompt's ``PromptReport``."""
LAYOUT = "flashvlm_prompt_layout"
"""Key of its ``PromptLayout``."""


class Layout(StrEnum):
    """Where a prompt's kept tokens are."""

    KEPT = "kept"
    CLOSED = "closed"
    SHORTENED = "shortened"
    """Kept, with gaps shortened so that prompt and answer fit into the model's positions."""


class PromptLayout:
    """Where a prompt's kept tokens are. Final when the longest answer is known."""

    def __init__(self, positions: VisualPositions) -> None:
        self.result = Layout(positions)

    def shorten(self) -> None:
        """Record that gaps were shortened."""
        self.result = Layout.SHORTENED


@dataclass(frozen=True)
class PromptReport:
    """Costs of one prompt's images and videos."""

    counts: tuple[ItemCount, ...]
    """One per item whose size is known, the images first."""
    budget: Budget | None = None
    """In force for them; ``None``: no pruning."""
    is_default: bool = False
    """Whether that is the server's budget, not the request's."""
    selector: str | None = None
    """In force for them, where there is a budget."""
    third_party_items: tuple[str, ...] = ()
    """Selection keys (hex) of items whose tokens a selector of another package chooses. Only the
    worker knows whether that succeeded."""
    explain: ExplainRequest | None = None
    """Set when the selection is to be explained, and there is one."""
    layout: PromptLayout | None = None
    """Set where something is pruned."""
