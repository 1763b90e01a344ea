# SPDX-License-Identifier: Apache-2.0
"""What the API process knows of a request whose selection is to be explained. Data only."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flashvlm_vllm.budget import Budget, TokenCount

WITNESS = "visual_witness"
"""The processor argument that asks for it: a name that no other request has."""


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
class WatchedItem:
    """One image or video."""

    modality: str
    identity: str
    """In the worker, hex."""
    width: int
    height: int
    count: TokenCount
    placed: dict[int, Placed]
    """By the number of the part; those whose place is not known are left out."""
    pictures: list[Any] = field(repr=False)
    """The image, or the frames, as vLLM read them."""


@dataclass(frozen=True)
class WatchedRequest:
    """One request and its items."""

    budget: Budget
    selector: str
    query_ids: tuple[int, ...] = field(repr=False)
    items: tuple[WatchedItem, ...]
