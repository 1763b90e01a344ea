# SPDX-License-Identifier: Apache-2.0
"""Converts the worker's records into grids with their regions of the image."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flashvlm_vllm.ipc.explain_request import PartRecord, Placed, Region

_DIGITS = 4


def parts_of(recorded: Sequence[PartRecord], placed: Mapping[int, Placed]) -> list[dict[str, Any]]:
    """Return grids of scores and the kept tokens' rows and columns, one per crop or time step.

    Args:
        recorded: the worker's records of an item's parts.
        placed: regions of the image, by part number; a part whose region is not known is missing.

    """
    return [
        _grid(frame, tokens, placed.get(part.part))
        for part in recorded
        for frame, tokens in _frames(part)
    ]


def _frames(part: PartRecord) -> Iterator[tuple[int, list[tuple[Any, ...]]]]:
    """Yield each time step's tokens: row and column, whether kept, and the three scores."""
    relevance: Sequence[float | None] = part.relevance or [None] * len(part.places)
    tokens = list(zip(part.places, part.kept, part.saliency, relevance, part.fused, strict=True))
    length = len(tokens) // part.frames
    for frame in range(part.frames):
        yield frame, tokens[frame * length : (frame + 1) * length]


def _grid(frame: int, tokens: Sequence[tuple[Any, ...]], placed: Placed | None) -> dict[str, Any]:
    # A crop may have no tokens at its edges, in the padding around the image.
    first_row = min(row for (row, _), *_ in tokens)
    first_column = min(column for (_, column), *_ in tokens)
    rows = max(row for (row, _), *_ in tokens) + 1 - first_row
    columns = max(column for (_, column), *_ in tokens) + 1 - first_column
    maps: list[list[list[float | None]]] = [
        [[None] * columns for _ in range(rows)] for _ in range(3)
    ]
    kept = []
    for (row, column), is_kept, *scores in tokens:
        place = row - first_row, column - first_column
        if is_kept:
            kept.append(list(place))
        for grid, score in zip(maps, scores, strict=True):
            grid[place[0]][place[1]] = score
    saliency, relevance, fused = maps
    has_relevance = any(token[3] is not None for token in tokens)
    region = None if placed is None else _region(placed, first_row, first_column, rows, columns)
    return {
        "frame": frame,
        "rows": rows,
        "columns": columns,
        "region": None if region is None else [round(each, _DIGITS) for each in region],
        "kept": kept,
        "saliency": saliency,
        "relevance": relevance if has_relevance else None,
        "fused": fused,
    }


def _region(placed: Placed, row: int, column: int, rows: int, columns: int) -> Region:
    """Return the region of some rows and columns of a grid whose region is known."""
    if placed.grid is None:
        return placed.region
    left, top, right, bottom = placed.region
    high, wide = (bottom - top) / placed.grid[0], (right - left) / placed.grid[1]
    return Region(
        left + column * wide,
        top + row * high,
        left + (column + columns) * wide,
        top + (row + rows) * high,
    )
