# SPDX-License-Identifier: Apache-2.0
"""Data of an explained request: its items in the API process, and the worker's records."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from flashvlm_vllm.request.budget import Budget, TokenCount
from flashvlm_vllm.request.request_budget import RequestBudget


class Region(NamedTuple):
    """A rectangle, in fractions of the image's width and height. It may extend beyond the image."""

    left: float
    top: float
    right: float
    bottom: float


WHOLE = Region(0.0, 0.0, 1.0, 1.0)


class Placed(NamedTuple):
    """The region of the image that a part of an item, such as a crop, covers."""

    region: Region
    """Region of the part's whole grid."""
    grid: tuple[int, int] | None = None
    """Rows and columns of that grid; set if tokens may be missing at its edges."""


@dataclass(frozen=True)
class ExplainItem:
    """One image or video of the request."""

    modality: str
    selection_key: str
    """In hexadecimal."""
    width: int
    height: int
    count: TokenCount
    budget: Budget | None
    """The budget that applies; ``None``: it is kept whole."""
    selector: str
    placed: dict[int, Placed]
    """By part number; a part whose region is not known is missing."""
    question_ids: tuple[int, ...] = field(repr=False)
    """Token ids of the words to score it with, also if the selector does not use them."""
    pictures: list[Any] = field(repr=False)
    """The image, or the frames of a video, as vLLM loaded them."""


@dataclass(frozen=True)
class ExplainRequest:
    """An explained request and its items."""

    budget: RequestBudget | None
    """Of the request, or the server's default."""
    selector: str
    items: tuple[ExplainItem, ...]


@dataclass(frozen=True)
class PartRecord:
    """The selection in one part of an item, such as a crop. Lists have one entry per token."""

    part: int
    """Number of the part."""
    frames: int
    """Number of time steps. Tokens are ordered by time step."""
    places: list[list[int]]
    """Row and column of each token."""
    kept: list[bool]
    saliency: list[float]
    relevance: list[float] | None
    """``None`` without a question."""
    fused: list[float]


@dataclass(frozen=True)
class Coverage:
    """Cosine distances of dropped tokens to the nearest kept one, 0 to 2."""

    max: float
    mean: float


@dataclass(frozen=True)
class ItemRecord:
    """The selection of one item, as the worker records it."""

    merged: bool
    """Whether tokens were merged; then no token is kept unchanged."""
    coverage: Coverage | None
    """``None`` if nothing was dropped."""
    parts: list[PartRecord]

    def packed(self) -> dict[str, Any]:
        """Return the record as a dictionary that vLLM can serialize."""
        return asdict(self)

    @classmethod
    def unpacked(cls, reply: Mapping[str, Any]) -> "ItemRecord":
        """Restore a record from the result of `packed`."""
        coverage = reply["coverage"]
        return cls(
            reply["merged"],
            None if coverage is None else Coverage(**coverage),
            [PartRecord(**each) for each in reply["parts"]],
        )
