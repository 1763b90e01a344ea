# SPDX-License-Identifier: Apache-2.0
"""Images, a video and words for the requests of a soak."""

import base64
import io
import random
from functools import cache
from typing import Final

from PIL import Image

from testing.photo import photo
from testing.tiny.llava import SENTENCES

SMALL: Final = ("astronaut", "cat", "coffee", "galaxies", "grey", "palette", "1x1", "1x90", "70x1")
HUGE: Final = "8192x8192"
VIDEO: Final = "a video"


@cache
def picture(name: str) -> str:
    """Return an image, or the video, as a ``data:`` URL."""
    if name == VIDEO:
        frames = [photo(each).resize((100, 90)) for each in ("cat", "cat", "coffee", "astronaut")]
        encoded = [_url(frame, "JPEG").partition(",")[2] for frame in frames]
        return f"data:video/jpeg;base64,{','.join(encoded)}"
    if name[0].isdigit():
        width, height = map(int, name.split("x"))
        # Large squares of a photograph: 64 megapixels in a file of less than a megabyte.
        image = photo("astronaut").resize((32, 32)).resize((width, height), Image.Resampling(0))
        return _url(image, "PNG")
    if name == "grey":
        return _url(photo("rocket").convert("L"), "PNG")
    if name == "palette":
        return _url(photo("motorcycle").convert("P"), "GIF")
    return _url(photo(name), {"coffee": "WEBP", "cat": "JPEG"}.get(name, "PNG"))


def new_picture(chance: random.Random) -> str:
    """Draw an image that was not sent before."""
    image = Image.frombytes("RGB", (24, 18), chance.randbytes(24 * 18 * 3))
    return _url(image.resize((240, 180)), "PNG")


def words(count: int, seed: int) -> str:
    """Return a question of ``count`` words, each one token."""
    known = [word for sentence in SENTENCES for word in sentence.split()]
    return " ".join(random.Random(seed).choices(known, k=count))


def _url(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{kind.lower()};base64,{encoded}"
