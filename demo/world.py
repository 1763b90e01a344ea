# SPDX-License-Identifier: Apache-2.0
"""The demo's pictures and questions, with the true answers."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from small_vlm.scenes import CELLS, Scene, draw, place_thing

# Colour, kind, cell and radius in pixels, in reading order.
_THINGS = (
    ("red", "ring", (0, 0), 14),
    ("blue", "star", (0, 3), 16),
    ("green", "square", (1, 1), 15),
    ("yellow", "h", (2, 3), 13),
    ("pink", "disc", (3, 0), 16),
    ("cyan", "triangle", (3, 2), 15),
)


class Asked(NamedTuple):
    """A question and its true answer."""

    question: str
    truth: str


QUESTIONS = (Asked("What color is the ring?", "red"), Asked("Which letter is yellow?", "h"))


def picture_of(seed: int, copy: int = 0) -> Image.Image:
    """Return the demo's objects on a background drawn from a seed, 168 pixels on a side.

    Another seed gives another image with the same answers.

    Args:
        seed: number of the background.
        copy: number below 8. Copies differ in one pixel, by 7 of 255 at most: vLLM and the plugin
            take each for another picture, and have none of the others' results in a cache.

    """
    rng = np.random.default_rng(seed)
    things = tuple(
        place_thing(rng, color, kind, cell, (0, 0), radius) for color, kind, cell, radius in _THINGS
    )
    pixels = draw(Scene(things, cells=CELLS, seed=seed))
    pixels[0, -1, -1] ^= copy
    return Image.fromarray(pixels)
