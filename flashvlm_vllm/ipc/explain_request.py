# SPDX-License-Identifier: Apache-2.0
"""A request whose selection is explained: what the API process knows of it, and what the worker
records. Data only."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from flashvlm_vllm.request.budget import Budget, TokenCount


class Region(NamedTuple):
    """A rectangle, in fractions of the picture's width and height; may reach beyond it."""

    left: float
    top: float
    right: float
    bottom: float


WHOLE = Region(0.0, 0.0, 1.0, 1.0)


class Placed(NamedTuple):
    """Where a part of an item, such as a crop, lies in the picture."""

    region: Region
    """Of the part's whole grid."""
    grid: tuple[int, int] | None = None
    """Rows and columns of that grid, where tokens of it may be missing at its edges."""


@dataclass(frozen=True)
class ExplainItem:
    """One image or video of the request."""

    modality: str
    selection_key: str
    """Hex."""
    width: int
    height: int
    count: TokenCount
    placed: dict[int, Placed]
    """By the number of the part; a part whose place is not known is left out."""
    pictures: list[Any] = field(repr=False)
    """The image, or the frames, as vLLM read them."""


@dataclass(frozen=True)
class ExplainRequest:
    """The request and its items."""

    budget: Budget
    selector: str
    question_ids: tuple[int, ...] = field(repr=False)
    items: tuple[ExplainItem, ...]


@dataclass(frozen=True)
class PartRecord:
    """The selection in one part of an item, such as a crop; lists have an entry per token."""

    part: int
    """Its number."""
    frames: int
    """Time steps; the tokens of one step follow those of the step before."""
    places: list[list[int]]
    """Row and column."""
    kept: list[bool]
    saliency: list[float]
    relevance: list[float] | None
    """``None`` without a question."""
    fused: list[float]


@dataclass(frozen=True)
class Coverage:
    """Distances of dropped tokens to the nearest kept one; 0 to 2."""

    max: float
    mean: float


@dataclass(frozen=True)
class ItemRecord:
    """The selection of one item, as the worker records it."""

    merged: bool
    """Whether tokens were merged, so that no token is kept as it was."""
    coverage: Coverage | None
    """``None`` where nothing was dropped."""
    parts: list[PartRecord]

    def packed(self) -> dict[str, Any]:
        """Return the record as vLLM can send it."""
        return asdict(self)

    @classmethod
    def unpacked(cls, reply: Mapping[str, Any]) -> "ItemRecord":
        """Undo ``packed``."""
        coverage = reply["coverage"]
        return cls(
            reply["merged"],
            None if coverage is None else Coverage(**coverage),
            [PartRecord(**each) for each in reply["parts"]],
        )
