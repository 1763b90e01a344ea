# SPDX-License-Identifier: Apache-2.0
"""Draws which patches of a picture were kept for two questions, and the cost of a conversation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from PIL import Image

from demo.conversation import Turn

SIZE = 336  # pixels on a side that the vision tower takes in
DIMMED = 0.36  # brightness of a dropped patch
FIGURE, DPI = (14.0, 6.8), 120
PANEL = 0.33  # width of the picture, as a share of the figure
SHARED, OWN = "white", "#ffb000"
STOCK = "#7d838f"
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


def compose(
    photo: Image.Image,
    first: Selection,
    second: Selection,
    conversation: Mapping[int | None, Sequence[Turn]],
    note: str,
) -> Figure:
    """Draw one panel per question, one for the turns by budget, and ``note`` below."""
    seen = as_the_tower_sees_it(photo)
    shared = set(first.kept) & set(second.kept)
    width, height = FIGURE
    figure = Figure(figsize=FIGURE, dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    title = f"One picture, two questions: {_difference(first, second)}"
    figure.text(0.345, 0.94, title, color=INK, size=14, weight="bold", ha="center")
    title = "A conversation with pictures"
    figure.text(0.855, 0.94, title, color=INK, size=14, weight="bold", ha="center")
    for left, selection in ((0.01, first), (0.35, second)):
        panel = figure.add_axes((left, 0.115, PANEL, PANEL * width / height))
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
    _draw_turns(figure, conversation)
    figure.legend(
        handles=[
            Patch(facecolor="none", edgecolor=SHARED, label="kept for both questions"),
            Patch(facecolor="none", edgecolor=OWN, label="kept for this question only"),
        ],
        loc="lower center",
        bbox_to_anchor=(0.345, 0.045),
        ncols=2,
        frameon=False,
        labelcolor=INK,
        fontsize=11,
    )
    figure.text(0.5, 0.025, note, color=INK, alpha=0.75, size=9.5, ha="center")
    return figure


def write(
    path: Path,
    photo: Image.Image,
    first: Selection,
    second: Selection,
    conversation: Mapping[int | None, Sequence[Turn]],
    note: str = "",
) -> None:
    """Draw and save as PNG."""
    compose(photo, first, second, conversation, note).savefig(path, format="png")


def _draw_turns(figure: Figure, conversation: Mapping[int | None, Sequence[Turn]]) -> None:
    """Draw the prompt tokens computed in each turn: bars side by side, one color per budget."""
    panel = figure.add_axes((0.735, 0.19, 0.245, 0.6), facecolor=PAPER)
    bar = 0.8 / len(conversation)
    for place, (budget, turns) in enumerate(conversation.items()):
        color = STOCK if budget is None else OWN
        label = "no budget" if budget is None else f"budget {budget}"
        at = [number + (place - (len(conversation) - 1) / 2) * bar for number in range(len(turns))]
        drawn = panel.bar(at, [turn.computed for turn in turns], bar, color=color, label=label)
        panel.bar_label(drawn, color=INK, fontsize=11, padding=2)
    panel.set_xticks(range(len(turns)), [f"turn {number + 1}" for number in range(len(turns))])
    panel.set_yticks([])
    panel.tick_params(colors=INK, length=0, labelsize=11)
    for side in panel.spines.values():
        side.set_visible(False)
    panel.set_title("prompt tokens computed", color=INK, size=12, pad=18)
    panel.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.1),
        ncols=2,
        frameon=False,
        labelcolor=INK,
        fontsize=11,
    )


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
