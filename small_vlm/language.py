# SPDX-License-Identifier: Apache-2.0
"""The words of the drawn world: questions about a scene, their answers, and descriptions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from small_vlm.scenes import CELLS, COLORS, KINDS, LETTERS, Scene, Thing

Family = Literal["color", "shape", "letter", "where", "side", "exist"]
FAMILIES: Final[tuple[Family, ...]] = ("color", "shape", "letter", "where", "exist")
"""What tests ask. ``side`` is half of ``where``, and easier to learn: one word answers it."""

DESCRIBE: Final = "describe the picture ."
# fmt: off
WORDS: Final = (
    *COLORS, *KINDS,
    "what", "color", "shape", "is", "the", "thing", "?", "which", "letter", "where", "there", "a",
    "yes", "no", "top", "bottom", "left", "right", "describe", "picture", ".", ",", "user", ":",
    "assistant", "and", "in", "or",
)
# fmt: on


@dataclass(frozen=True)
class Question:
    """A question about one scene; ``about`` is the index of the object in question, if there."""

    family: Family
    text: str
    answer: str
    about: int | None


def name_of(kind: str) -> str:
    """Return how a question names a kind."""
    return f"letter {kind}" if kind in LETTERS else kind


def place_of(thing: Thing) -> str:
    """Return the quarter of the full canvas in which an object lies."""
    row, column = thing.cell
    half = CELLS // 2
    return f"{'top' if row < half else 'bottom'} {'left' if column < half else 'right'}"


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """List all unambiguous questions about a scene.

    Questions of existence come in pairs, one for yes and one for no. The absent object has a
    colour and a kind that are both there where the scene allows it, so that seeing either is
    not enough.
    """
    things = scene.things
    kinds = Counter(thing.kind for thing in things)
    tints = Counter((thing.color, thing.kind in LETTERS) for thing in things)
    asked = []
    for index, thing in enumerate(things):
        name = name_of(thing.kind)
        if kinds[thing.kind] == 1:
            asked.append(Question("color", f"what color is the {name} ?", thing.color, index))
            place = place_of(thing)
            asked.append(Question("where", f"where is the {name} ?", place, index))
            which = int(rng.integers(2))
            choice = ("top or bottom", "left or right")[which]
            asked.append(Question("side", f"is the {name} {choice} ?", place.split()[which], index))
        is_letter = thing.kind in LETTERS
        if tints[thing.color, is_letter] == 1:
            family: Family = "letter" if is_letter else "shape"
            text = (
                f"which letter is {thing.color} ?"
                if is_letter
                else (f"what shape is the {thing.color} thing ?")
            )
            asked.append(Question(family, text, thing.kind, index))
    present = {(thing.color, thing.kind) for thing in things}
    pairs = [(color, kind) for color in COLORS for kind in KINDS if (color, kind) not in present]
    near = [
        (color, kind)
        for color, kind in pairs
        if kinds[kind] and any(thing.color == color for thing in things)
    ]
    for index in rng.permutation(len(things))[:2].tolist():
        thing = things[index]
        asked.append(_exists(thing.color, thing.kind, "yes", index))
        candidates = near if near and rng.random() < 0.7 else pairs
        color, kind = candidates[rng.integers(len(candidates))]
        asked.append(_exists(color, kind, "no", None))
    return asked


def _exists(color: str, kind: str, answer: str, about: int | None) -> Question:
    return Question("exist", f"is there a {color} {name_of(kind)} ?", answer, about)


def phrase(thing: Thing) -> str:
    """Return an object's entry in a description."""
    return f"{place_of(thing)} {thing.color} {name_of(thing.kind)}"


def description(scene: Scene) -> str:
    """Return all objects in reading order."""
    return " , ".join(phrase(thing) for thing in scene.things) + " ."
