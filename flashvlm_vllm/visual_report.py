# SPDX-License-Identifier: Apache-2.0
"""What the processor says of a prompt's images and videos to the API process around it."""

from dataclasses import dataclass
from enum import StrEnum

from flashvlm_vllm.budget import Budget, ItemCount
from flashvlm_vllm.explained import WatchedRequest
from flashvlm_vllm.visual_positions import VisualPositions

REPORT = "visual_tokens"
"""Where a processed prompt carries its ``VisualReport``."""
LAYOUT = "visual_layout"
"""Where it carries its ``PromptLayout``."""


class Layout(StrEnum):
    """What became of the places of a prompt's kept tokens."""

    KEPT = "kept"
    CLOSED = "closed"
    SHORTENED = "shortened"
    """Kept, with gaps shortened so that prompt and answer fit into the model's positions."""


class PromptLayout:
    """What became of a prompt's places. Settled when its longest answer is known."""

    def __init__(self, positions: VisualPositions) -> None:
        self.result = Layout(positions)

    def shorten(self) -> None:
        """Note that gaps were shortened."""
        self.result = Layout.SHORTENED


@dataclass(frozen=True)
class VisualReport:
    """What one prompt's images and videos cost, for the answer and for the check behind it."""

    counts: tuple[ItemCount, ...]
    """One per item whose size is known, the images first."""
    budget: Budget | None = None
    """In force for them; ``None``: no pruning."""
    is_default: bool = False
    """Whether that is the server's budget, not the request's."""
    selector: str | None = None
    """In force for them, where there is a budget."""
    unproven: tuple[str, ...] = ()
    """Identities (hex) of items whose tokens a selector of another package chooses. Whether
    that succeeded only the worker knows."""
    watched: WatchedRequest | None = None
    """Set when the selection is to be explained, and there is one."""
    layout: PromptLayout | None = None
    """Set where something is pruned."""
