# SPDX-License-Identifier: Apache-2.0
"""Draws the kept patches over an image, or over a video's frames, as PNG."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

_LARGEST_PANEL = 672
_SMALLEST_PANEL = 32
_LARGEST_SHEET = 2048
"""Most pixels along a side."""
_GAP = 6
_PAPER = (22, 24, 29)
_OUTLINE = (255, 176, 0)
_DROPPED = 0.36
"""Brightness of dropped patches."""


@dataclass
class _Panel:
    """One picture with the grids drawn over it, or one grid without a picture."""

    picture: Image.Image | None
    parts: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in any unit."""
        if self.picture is not None:
            return self.picture.size
        (part,) = self.parts
        return part["columns"], part["rows"]


def draw(items: Sequence[tuple[Mapping[str, Any], Sequence[Any]]]) -> bytes:
    """Return a PNG with one panel per frame, and further panels for overlapping grids.

    Dropped patches are dark; kept patches have their colours and an outline. For a grid whose
    region is not known, its fused scores are drawn instead, with kept tokens outlined.

    Args:
        items: for each image or video its entry in the response of ``/v1/visual_tokens``, and its
            pictures: the image, or one per frame, as PIL images or ``(H, W, 3)`` uint8 arrays.

    """
    panels = [panel for told, pictures in items for panel in _panels(told, pictures)]
    columns = math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    side = min(_LARGEST_PANEL, _LARGEST_SHEET // max(columns, rows) - _GAP)
    side = max(_SMALLEST_PANEL, side)
    drawn = [_drawn(panel, side) for panel in panels]
    wide = max(each.width for each in drawn) + _GAP
    high = max(each.height for each in drawn) + _GAP
    sheet = Image.new("RGB", (columns * wide + _GAP, rows * high + _GAP), _PAPER)
    for number, each in enumerate(drawn):
        row, column = divmod(number, columns)
        sheet.paste(each, (_GAP + column * wide, _GAP + row * high))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _panels(told: Mapping[str, Any], pictures: Sequence[Any]) -> Iterator[_Panel]:
    parts = told["parts"]
    steps = 1 + max(part["frame"] for part in parts)
    for step in range(steps):
        # A time step may consist of several frames; the first is drawn.
        picture = _as_image(pictures[step * len(pictures) // steps])
        panels: list[_Panel] = []
        for part in (each for each in parts if each["frame"] == step):
            if part["region"] is None:
                panels.append(_Panel(None, [part]))
                continue
            free = (each for each in panels if each.picture is not None and _is_free(each, part))
            panel = next(free, None)
            if panel is None:
                panel = _Panel(picture)
                panels.append(panel)
            panel.parts.append(part)
        yield from panels


def _as_image(picture: Any) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    return Image.fromarray(np.asarray(picture, dtype=np.uint8)).convert("RGB")


def _is_free(panel: _Panel, part: Mapping[str, Any]) -> bool:
    """Return whether a part does not overlap those already in a panel."""
    left, top, right, bottom = part["region"]
    slack = 1e-2  # Regions are rounded, and tiles end at whole patches.
    return all(
        right <= other[0] + slack
        or left >= other[2] - slack
        or bottom <= other[1] + slack
        or top >= other[3] - slack
        for other in (each["region"] for each in panel.parts)
    )


def _drawn(panel: _Panel, side: int) -> Image.Image:
    wide, high = panel.size
    scale = side / max(wide, high)
    size = max(1, round(wide * scale)), max(1, round(high * scale))
    if panel.picture is None:
        whole = _heat(panel.parts[0]).resize(size, Image.Resampling.NEAREST)
    else:
        whole = panel.picture.resize(size, Image.Resampling.BICUBIC)
    grey = whole.convert("L").convert("RGB")
    dark = Image.blend(whole, grey, 0.5).point(lambda value: value * _DROPPED)
    sheet = whole.copy() if panel.picture is None else dark
    pen = ImageDraw.Draw(sheet)
    for part in panel.parts:
        for box in _boxes(part, size):
            sheet.paste(whole.crop(box), box[:2])
            if min(box[2] - box[0], box[3] - box[1]) >= 4:
                pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=_OUTLINE)
    return sheet


def _boxes(part: Mapping[str, Any], size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield the pixel boxes of kept patches, clipped to the picture."""
    left, top, right, bottom = part["region"] or (0.0, 0.0, 1.0, 1.0)
    wide, high = (right - left) / part["columns"], (bottom - top) / part["rows"]
    for row, column in part["kept"]:
        xs = (left + column * wide, left + (column + 1) * wide)
        ys = (top + row * high, top + (row + 1) * high)
        x0, x1 = (min(size[0], max(0, round(x * size[0]))) for x in xs)
        y0, y1 = (min(size[1], max(0, round(y * size[1]))) for y in ys)
        if x0 < x1 and y0 < y1:
            yield x0, y0, x1, y1


def _heat(part: Mapping[str, Any]) -> Image.Image:
    scores = np.array([[0.0 if score is None else score for score in row] for row in part["fused"]])
    return Image.fromarray((255 * scores).clip(0, 255).astype(np.uint8)).convert("RGB")
