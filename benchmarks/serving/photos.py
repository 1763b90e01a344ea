# SPDX-License-Identifier: Apache-2.0
"""Questions about parts of real photographs, in the form that ``vllm bench serve`` reads."""

import json
import random
from pathlib import Path
from typing import Final

from benchmarks.measuring.pictures import picture
from testing.photo import data_url

QUESTIONS: Final = (
    "What is in this picture?",
    "Describe the image in one short sentence.",
    "Which colour is the object in the middle?",
    "What is on the left, and what is behind it?",
    "Is there a person or an animal in the image? Name every one that you can see.",
    "What does the text say, if there is any?",
    "How many things stand in front, and what are they made of?",
    "Is it day or night? Say how you know.",
)
PICTURES_PER_SEED: Final = 1000


def write_photos(file: Path, count: int, seed: int) -> Path:
    """Write ``count`` questions, each about a picture that no other seed asks about."""
    draw = random.Random(seed)
    lines = []
    for index in range(count):
        url = data_url(picture(seed * PICTURES_PER_SEED + index), format="JPEG")
        lines.append(json.dumps({"prompt": draw.choice(QUESTIONS), "image_files": [url]}))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    return file
