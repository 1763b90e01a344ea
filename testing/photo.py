# SPDX-License-Identifier: Apache-2.0
"""Real photographs without a download: some that ship inside scikit-image's package."""

import base64
import io
from pathlib import Path

import skimage
from PIL import Image

# Name to file. The package's other pictures are fetched on first use, hence not listed.
FILES = {
    "astronaut": "astronaut.png",  # a woman in an orange suit, 512 x 512
    "cat": "chelsea.png",  # 451 x 300
    "coffee": "coffee.png",  # a cup on a table, 600 x 400
    "galaxies": "hubble_deep_field.jpg",  # 1000 x 872
    "motorcycle": "motorcycle_left.png",  # in a garage, 741 x 497
    "rocket": "rocket.jpg",  # on its pad, 640 x 427
}


def photo(name: str = "astronaut") -> Image.Image:
    """One photograph, RGB. Raises ``KeyError`` with the known names for an unknown one."""
    if name not in FILES:
        raise KeyError(f"no photo called {name!r}; there are {', '.join(FILES)}")
    return Image.open(Path(skimage.__file__).parent / "data" / FILES[name]).convert("RGB")


def data_url(image: Image.Image, *, format: str = "PNG") -> str:
    """The image as an OpenAI-style ``data:`` URL. PNG, the default, keeps every pixel."""
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{format.lower()};base64,{encoded}"
