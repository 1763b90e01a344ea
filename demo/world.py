# SPDX-License-Identifier: Apache-2.0
"""The demo's pictures and questions, with the true answers."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from small_vlm.scenes import Scene, Thing, draw, place_thing


class Asked(NamedTuple):
    """A question and its true answer."""

    question: str
    truth: str


@dataclass(frozen=True)
class DemoPicture:
    """A drawn scene, and what to ask about it."""

    scene: Scene
    questions: tuple[Asked, Asked]


def scene_picture(picture: DemoPicture) -> Image.Image:
    """The picture, 168 pixels on a side."""
    return Image.fromarray(draw(picture.scene))


def _scene(seed: int, *things: tuple[str, str, tuple[int, int], int]) -> Scene:
    rng = np.random.default_rng(seed)
    placed: list[Thing] = [
        place_thing(rng, color, kind, cell, (0, 0), radius) for color, kind, cell, radius in things
    ]
    return Scene(tuple(sorted(placed, key=lambda thing: thing.cell)), cells=4, seed=seed)


PICTURES = tuple(
    DemoPicture(
        _scene(
            seed,
            ("red", "ring", (0, 0), 14),
            ("blue", "star", (0, 3), 16),
            ("green", "square", (1, 1), 15),
            ("yellow", "h", (2, 3), 13),
            ("pink", "disc", (3, 0), 16),
            ("cyan", "triangle", (3, 2), 15),
        ),
        (
            Asked("What color is the ring?", "red"),
            Asked("Which letter is yellow?", "h"),
        ),
    )
    for seed in range(4)
)
"""Four drawings of the same things on other grounds: to every cache, four images."""
