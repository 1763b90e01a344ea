# SPDX-License-Identifier: Apache-2.0
"""Drawn scenes: coloured shapes and letters on cluttered grounds, with the box of each.

A scene lives on a grid of cells, 42 pixels (6 patches) wide, with at most one object in each. The
training of the tower also uses small pieces of the canvas, 1 x 1 or 2 x 2 cells.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

PATCH: Final = 7
CELL_PATCHES: Final = 6
CELL: Final = PATCH * CELL_PATCHES
CELLS: Final = 4
"""Cells along a side of the full canvas: 24 x 24 patches, as LLaVA-1.5's tower has."""
IMAGE_SIZE: Final = CELL * CELLS
SIDE: Final = IMAGE_SIZE // PATCH
"""Patches along a side of the full canvas."""

COLORS: Final = {
    "red": (215, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 80, 225),
    "yellow": (235, 215, 45),
    "pink": (235, 90, 200),
    "cyan": (45, 215, 220),
}
SHAPES: Final = ("disc", "square", "triangle", "cross", "ring", "star")
LETTERS: Final = ("h", "k", "m", "z")
KINDS: Final = SHAPES + LETTERS

ANY_SIZE: Final = (8, 20)
SMALL: Final = (8, 10)
LARGE: Final = (18, 20)
"""Ranges of an object's radius in pixels, both ends included."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Thing:
    """One object: what it is, its cell on the full canvas (row, column), its place in the picture
    in pixels.
    """

    color: str
    kind: str
    cell: tuple[int, int]
    center: tuple[int, int]
    radius: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels; right and bottom lie outside."""
        x, y = self.center
        return x - self.radius, y - self.radius, x + self.radius, y + self.radius


@dataclass(frozen=True)
class Scene:
    """Objects in reading order on a canvas, or on a piece of it, of ``cells`` x ``cells``.

    ``origin`` is the piece's first cell on the full canvas; ``seed`` draws the rest.
    """

    things: tuple[Thing, ...]
    cells: int
    seed: int
    origin: tuple[int, int] = (0, 0)


def sample_scene(
    rng: np.random.Generator,
    count: int,
    cells: int = CELLS,
    radii: Sequence[tuple[int, int]] = (ANY_SIZE,),
    origin: tuple[int, int] = (0, 0),
) -> Scene:
    """Place ``count`` random objects in different cells.

    Args:
        rng: the source of all that is random, the ground included.
        count: at most ``cells`` squared.
        cells: along a side of the canvas.
        radii: range of each object's radius; the last one stands for all further objects.
        origin: the canvas's first cell, if it is a piece of the full one.

    """
    places = rng.permutation(cells * cells)[:count]
    colors = list(COLORS)
    things = []
    for index, place in enumerate(places):
        low, high = radii[min(index, len(radii) - 1)]
        things.append(
            place_thing(
                rng,
                colors[rng.integers(len(colors))],
                KINDS[rng.integers(len(KINDS))],
                divmod(int(place), cells),
                origin,
                int(rng.integers(low, high + 1)),
            )
        )
    things.sort(key=lambda thing: thing.cell)
    return Scene(tuple(things), cells, int(rng.integers(2**31)), origin)


def place_thing(
    rng: np.random.Generator,
    color: str,
    kind: str,
    cell: tuple[int, int],
    origin: tuple[int, int],
    radius: int,
) -> Thing:
    """Put an object somewhere in a cell of the piece that begins at ``origin``, wholly inside."""
    low, high = radius, CELL - radius
    y, x = (int(part * CELL + rng.integers(low, high + 1)) for part in cell)
    return Thing(color, kind, (cell[0] + origin[0], cell[1] + origin[1]), (x, y), radius)


def draw(scene: Scene) -> Pixels:
    """Return the scene's picture, ``(H, W, 3)``; the same scene always looks the same."""
    rng = np.random.default_rng(scene.seed)
    side = scene.cells * CELL
    picture = ground(rng, side)
    for thing in scene.things:
        left, top, right, bottom = thing.box
        color = np.asarray(COLORS[thing.color], np.float32) + rng.normal(0, 12, 3)
        mask = sprite(thing.kind, thing.radius)[..., None]
        part = picture[top:bottom, left:right]
        part += mask * (color - part)
    noise = _noise()[: side * side * 3].reshape(side, side, 3)
    picture += np.roll(noise, int(rng.integers(side)), axis=0)
    return picture.clip(0, 255).astype(np.uint8)


def ground(rng: np.random.Generator, side: int) -> NDArray[np.float32]:
    """Draw greyish patches of light and thin lines: clutter, but none of the colours."""
    steps = side // 21 + 1
    coarse = rng.uniform(40, 200, (steps, steps, 1)) + rng.normal(0, 10, (steps, steps, 3))
    image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(side // 14):
        tone = int(rng.integers(20, 230))
        x, y = rng.integers(0, side, 2).tolist()
        dx, dy = rng.integers(-25, 26, 2).tolist()
        pen.line((x, y, x + dx, y + dy), fill=(tone, tone, tone), width=1)
    return np.asarray(image, np.float32).copy()


@functools.cache
def _noise() -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    return rng.normal(0, 8, IMAGE_SIZE * IMAGE_SIZE * 3).astype(np.float32)


@functools.cache
def sprite(kind: str, radius: int) -> NDArray[np.float32]:
    """Return the coverage of an object's box, ``(2 r, 2 r)`` from 0 to 1."""
    scale = 4
    side = 2 * radius * scale
    image = Image.new("L", (side, side))
    pen = ImageDraw.Draw(image)
    end = side - 1
    if kind == "disc":
        pen.ellipse((0, 0, end, end), fill=255)
    elif kind == "square":
        pen.rectangle((0.1 * side, 0.1 * side, 0.9 * end, 0.9 * end), fill=255)
    elif kind == "triangle":
        pen.polygon([(side / 2, 0), (end, 0.92 * end), (0, 0.92 * end)], fill=255)
    elif kind == "cross":
        pen.rectangle((0.34 * side, 0, 0.66 * side, end), fill=255)
        pen.rectangle((0, 0.34 * side, end, 0.66 * side), fill=255)
    elif kind == "ring":
        pen.ellipse((0, 0, end, end), fill=255)
        pen.ellipse((0.27 * side, 0.27 * side, 0.73 * side, 0.73 * side), fill=0)
    elif kind == "star":
        turns = np.arange(10) * np.pi / 5
        reach = np.where(np.arange(10) % 2 == 0, 0.5, 0.2) * side
        points = zip(
            side / 2 + reach * np.sin(turns), side / 2 - reach * np.cos(turns), strict=True
        )
        pen.polygon([(float(x), float(y)) for x, y in points], fill=255)
    else:
        for stroke in _STROKES[kind]:
            line = [(x * side, y * side) for x, y in stroke]
            pen.line(line, fill=255, width=round(0.17 * side), joint="curve")
    small = image.resize((2 * radius, 2 * radius), Image.Resampling.BOX)
    coverage: NDArray[np.float32] = np.asarray(small, np.float32) / np.float32(255)
    return coverage


_STROKES: Final = {
    "h": (((0.2, 0.02), (0.2, 0.98)), ((0.8, 0.02), (0.8, 0.98)), ((0.2, 0.5), (0.8, 0.5))),
    "k": (((0.22, 0.02), (0.22, 0.98)), ((0.82, 0.04), (0.26, 0.52), (0.84, 0.96))),
    "m": (((0.1, 0.98), (0.16, 0.06), (0.5, 0.7), (0.84, 0.06), (0.9, 0.98)),),
    "z": (((0.1, 0.1), (0.9, 0.1), (0.1, 0.9), (0.9, 0.9)),),
}
