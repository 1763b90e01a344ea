# SPDX-License-Identifier: Apache-2.0
"""Scenes of emoji on smooth backgrounds, and three kinds of questions about them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.language_attention.real_parts.parts import picture

NAMES: Final = tuple(Path(__file__).with_name("names.txt").read_text().split())
"""Of the pictures that are used: 187 words."""
PLACES: Final = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Thing:
    """One picture in a scene: its middle and its size in pixels."""

    name: str
    x: float
    y: float
    size: int

    def place(self, side: int) -> str:
        """Say in which ninth of the scene the middle is."""
        return PLACES[min(2, int(self.y * 3 / side))][min(2, int(self.x * 3 / side))]


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and what it is about."""

    kind: str
    """``what`` (is there), ``where``, ``exist``, or ``name`` in the first stages of training."""
    text: str
    answer: str
    about: Thing | None


def scene(
    rng: random.Random, side: int, count: int, smallest: int, largest: int
) -> tuple[Pixels, list[Thing]]:
    """Draw a scene of (side, side, 3) with at most so many things, of so many pixels each."""
    image = _background(rng, side)
    things: list[Thing] = []
    for name in rng.sample(NAMES, count):
        for _ in range(60):
            size = rng.randint(smallest, largest)
            left, top = rng.randint(0, side - size), rng.randint(0, side - size)
            thing = Thing(name, left + size / 2, top + size / 2, size)
            if all(_are_apart(thing, other) for other in things):
                cut: Any = picture(name).resize((size, size), Image.Resampling.BILINEAR)
                if rng.random() < 0.5:
                    cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                image.paste(cut, (left, top), cut)
                things.append(thing)
                break
    return np.asarray(image), things


def questions(rng: random.Random, side: int, things: list[Thing]) -> list[Asked]:
    """Ask what is at a place, where a thing is, and whether things are there, in random order."""
    places = [thing.place(side) for thing in things]
    asked = []
    for thing, place in zip(things, places, strict=True):
        if places.count(place) == 1:
            asked.append(Asked("what", f"What is at the {place}?", thing.name, thing))
        asked.append(Asked("where", f"Where is the {thing.name}?", place, thing))
        asked.append(Asked("exist", f"Is there {_a(thing.name)}?", "yes", thing))
    present = {thing.name for thing in things}
    for _ in things:
        absent = rng.choice([name for name in NAMES if name not in present])
        asked.append(Asked("exist", f"Is there {_a(absent)}?", "no", None))
    rng.shuffle(asked)
    return asked


def naming(thing: Thing) -> Asked:
    """Ask what the only thing is."""
    return Asked("name", "What is this?", thing.name, thing)


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _are_apart(one: Thing, other: Thing) -> bool:
    distance = max(abs(one.x - other.x), abs(one.y - other.y))
    return distance >= 0.475 * (one.size + other.size)


def _background(rng: random.Random, side: int) -> Image.Image:
    patches = rng.choice([2, 3, 5, 8])
    middle = [rng.randint(30, 225) for _ in range(3)]
    spread = rng.randint(5, 60)
    colours = [[[rng.gauss(each, spread) for each in middle] for _ in range(patches)]
               for _ in range(patches)]  # fmt: skip
    small = np.clip(np.array(colours), 0, 255).astype(np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
