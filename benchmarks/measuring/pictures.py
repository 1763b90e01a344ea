# SPDX-License-Identifier: Apache-2.0
"""Any number of different images: square parts of a few photographs."""

import random
from typing import Final

from PIL import Image

from testing.photo import FILES, photo

SIDE: Final = 336


def picture(number: int, side: int = SIDE) -> Image.Image:
    """Cut a part out of a photograph; different numbers almost always give different parts."""
    draw = random.Random(number)
    image = photo(list(FILES)[number % len(FILES)])
    length = draw.randint(min(image.size) // 2, min(image.size))
    left, top = (draw.randint(0, whole - length) for whole in image.size)
    return image.crop((left, top, left + length, top + length)).resize((side, side))
