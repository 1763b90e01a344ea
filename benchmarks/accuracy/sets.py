# SPDX-License-Identifier: Apache-2.0
"""The test sets: drawn scenes with one question each, never seen in training.

Training draws from seeds below ``FIRST_TEST_SEED``; a set's seed lies above it. Every scene has
one question, so that answers are independent of one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from small_vlm.language import FAMILIES, Family, Question, place_of, questions
from small_vlm.scenes import (
    CELL,
    CELLS,
    LARGE,
    PATCH,
    SMALL,
    Pixels,
    Scene,
    Thing,
    draw,
    sample_scene,
)

FIRST_TEST_SEED: Final = 1_000_000
ANY_SIZE: Final = ((8, 20),)  # As in training.
SIDE: Final = CELLS * CELL // PATCH
FRAMES: Final = 4


@dataclass(frozen=True)
class Item:
    """One question about one picture, or about the frames of a clip."""

    frames: tuple[Scene, ...]
    question: Question
    about: Thing | None
    """The object asked for, if it is there."""

    def pictures(self) -> list[Pixels]:
        """Draw the frames."""
        return [draw(scene) for scene in self.frames]

    def frames_with_it(self) -> list[int]:
        """Tell in which frames the object asked for can be seen."""
        return [i for i, scene in enumerate(self.frames) if self.about in scene.things]


def plain(count: int, seed: int) -> list[Item]:
    """Scenes of three to eight objects of any size; the question families take turns."""
    return _collect(count, seed, FAMILIES, _plain_scenes)


def stress(count: int, seed: int) -> list[Item]:
    """The question is about a small object, and three to five large ones distract (Table 12)."""
    families: tuple[Family, ...] = ("color", "shape", "letter", "where")
    return _collect(count, seed, families, _stress_scenes)


def clips(count: int, seed: int) -> list[Item]:
    """Clips of four frames: some objects stay, some are in one frame only (Table 2).

    The questions ask for what something is, of an object that stays or of one that passes by.
    """
    rng = np.random.default_rng([FIRST_TEST_SEED, seed, 2])
    families: tuple[Family, ...] = ("color", "shape", "letter")
    items: list[Item] = []
    while len(items) < count:
        family = families[len(items) % len(families)]
        frames = sample_clip(rng)
        item = ask_about_clip(frames, family, rng)
        if item is not None:
            items.append(item)
    return items


def sample_clip(rng: np.random.Generator, frames: int = FRAMES) -> tuple[Scene, ...]:
    """Draw a clip: two to four objects stay, and each frame has one or two of its own."""
    stay = int(rng.integers(2, 5))
    passing = rng.integers(1, 3, frames)
    whole = sample_scene(rng, stay + int(passing.sum()), CELLS, ANY_SIZE)
    shuffled = [whole.things[i] for i in rng.permutation(len(whole.things))]
    still, rest = shuffled[:stay], shuffled[stay:]
    clip = []
    for number in passing.tolist():
        own, rest = rest[:number], rest[number:]
        things = tuple(sorted([*still, *own], key=lambda thing: thing.cell))
        clip.append(replace(whole, things=things))
    return tuple(clip)


def ask_about_clip(
    frames: tuple[Scene, ...], family: Family, rng: np.random.Generator
) -> Item | None:
    """Ask one question of a family about everything that a clip shows, if there is one."""
    things = tuple(sorted({t for scene in frames for t in scene.things}, key=lambda t: t.cell))
    union = replace(frames[0], things=things)
    asked = [question for question in questions(union, rng) if question.family == family]
    if not asked:
        return None
    question = asked[rng.integers(len(asked))]
    assert question.about is not None
    return Item(frames, question, things[question.about])


def _plain_scenes(rng: np.random.Generator) -> tuple[Scene, None]:
    return sample_scene(rng, int(rng.integers(3, 9)), CELLS, ANY_SIZE), None


def _stress_scenes(rng: np.random.Generator) -> tuple[Scene, int]:
    scene = sample_scene(rng, int(rng.integers(4, 7)), CELLS, (SMALL, LARGE))
    # The first one drawn is the small one; the scene is in reading order by now.
    return scene, min(range(len(scene.things)), key=lambda i: scene.things[i].radius)


def _collect(count: int, seed: int, families: tuple[Family, ...], scenes: object) -> list[Item]:
    rng = np.random.default_rng([FIRST_TEST_SEED, seed])
    items: list[Item] = []
    while len(items) < count:
        family = families[len(items) % len(families)]
        scene, about = scenes(rng)  # type: ignore[operator]
        asked = [
            question
            for question in questions(scene, rng)
            if question.family == family and (about is None or question.about == about)
        ]
        if asked:
            question = asked[rng.integers(len(asked))]
            thing = None if question.about is None else scene.things[question.about]
            items.append(Item((scene,), question, thing))
    return items


def box_patches(thing: Thing) -> list[int]:
    """List the patches of the raster that an object's box touches."""
    left, top, right, bottom = thing.box
    rows = range(top // PATCH, (bottom - 1) // PATCH + 1)
    columns = range(left // PATCH, (right - 1) // PATCH + 1)
    return [row * SIDE + column for row in rows for column in columns]


def nearest_patches(thing: Thing, budget: int) -> list[int]:
    """List the ``budget`` patches nearest to an object's centre, ascending: the oracle's choice."""
    x, y = thing.center
    rows, columns = np.divmod(np.arange(SIDE * SIDE), SIDE)
    distance = np.hypot((rows + 0.5) * PATCH - y, (columns + 0.5) * PATCH - x)
    return sorted(np.argsort(distance, kind="stable")[:budget].tolist())


def batches(items: list[Item], size: int) -> Iterator[list[Item]]:
    """Cut a set into consecutive batches."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


__all__ = [
    "Item",
    "ask_about_clip",
    "batches",
    "box_patches",
    "clips",
    "nearest_patches",
    "place_of",
    "plain",
    "sample_clip",
    "stress",
]
