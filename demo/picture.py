# SPDX-License-Identifier: Apache-2.0
"""Draws which patches of a picture were kept for two questions, side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from PIL import Image

SIZE = 336  # pixels on a side that the vision tower takes in
DIMMED = 0.36  # brightness of a dropped patch
FIGURE, DPI = (11.0, 7.0), 150
SHARED, OWN = "white", "#ffb000"
INK, PAPER = "#e8e8e8", "#16181d"  # On a dark page the dimmed patches recede.


@dataclass(frozen=True)
class Selection:
    """The patches that were kept for one question, in reading order from 0."""

    question: str
    kept: Sequence[int]
    total: int


def as_the_tower_sees_it(image: Image.Image) -> Image.Image:
    """Apply CLIP's resizing and centre crop, without its normalisation."""
    width, height = image.size
    short = min(width, height)
    resized = image.resize(
        (int(width * SIZE / short), int(height * SIZE / short)), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - SIZE) // 2, (resized.height - SIZE) // 2
    return resized.crop((left, top, left + SIZE, top + SIZE))


def dim_dropped(image: Image.Image, selection: Selection) -> NDArray[np.uint8]:
    """The pixels ``(336, 336, 3)``, darker and greyer outside the kept patches."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    grey = pixels.mean(axis=2, keepdims=True)
    dropped = DIMMED * (pixels + grey) / 2
    side = _side(selection)
    mask = np.zeros(selection.total, dtype=bool)
    mask[list(selection.kept)] = True
    mask = mask.reshape(side, side).repeat(SIZE // side, axis=0).repeat(SIZE // side, axis=1)
    return np.where(mask[..., None], pixels, dropped).astype(np.uint8)


def compose(photo: Image.Image, first: Selection, second: Selection, note: str) -> Figure:
    """The figure: one panel per question, ``note`` below."""
    seen = as_the_tower_sees_it(photo)
    shared = set(first.kept) & set(second.kept)
    width, height = FIGURE
    figure = Figure(figsize=FIGURE, dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    title = f"One picture, two questions: {_difference(first, second)}"
    figure.text(0.5, 0.945, title, color=INK, size=15, weight="bold", ha="center")
    for left, selection in ((0.025, first), (0.515, second)):
        panel = figure.add_axes((left, 0.115, 0.46, 0.46 * width / height))
        panel.imshow(dim_dropped(seen, selection), interpolation="nearest")
        panel.set_axis_off()
        panel.set_title(
            f"“{selection.question}”\n{len(selection.kept)} of {selection.total} patches kept",
            color=INK,
            size=12,
            pad=8,
            linespacing=1.4,
        )
        for color, indices in (
            (SHARED, sorted(shared)),
            (OWN, sorted(set(selection.kept) - shared)),
        ):
            panel.add_collection(_outlines(indices, selection, color))
    figure.legend(
        handles=[
            Patch(facecolor="none", edgecolor=SHARED, label="kept for both questions"),
            Patch(facecolor="none", edgecolor=OWN, label="kept for this question only"),
        ],
        loc="lower center",
        bbox_to_anchor=(0.5, 0.05),
        ncols=2,
        frameon=False,
        labelcolor=INK,
        fontsize=11,
    )
    figure.text(0.5, 0.025, note, color=INK, alpha=0.75, size=9.5, ha="center")
    return figure


def write(
    path: Path, photo: Image.Image, first: Selection, second: Selection, note: str = ""
) -> None:
    """Draw and save as PNG."""
    compose(photo, first, second, note).savefig(path, format="png")


def differing(first: Selection, second: Selection) -> int:
    """How many patches were kept for the first question and not for the second."""
    return len(set(first.kept) - set(second.kept))


def _difference(first: Selection, second: Selection) -> str:
    return f"{differing(first, second)} of the {len(first.kept)} kept patches differ"


def _side(selection: Selection) -> int:
    side = math.isqrt(selection.total)
    if side**2 != selection.total or SIZE % side:
        raise ValueError(f"{selection.total} patches do not tile {SIZE} x {SIZE} pixels")
    return side


def _outlines(indices: Sequence[int], selection: Selection, color: str) -> PatchCollection:
    side = _side(selection)
    edge = SIZE // side
    # A pixel's centre, not its corner, lies on whole numbers; hence half a pixel inside the patch,
    # so that neighbours do not draw over each other.
    frames = [
        Rectangle((index % side * edge, index // side * edge), edge - 1, edge - 1)
        for index in indices
    ]
    return PatchCollection(frames, facecolor="none", edgecolor=color, linewidth=1.0)
