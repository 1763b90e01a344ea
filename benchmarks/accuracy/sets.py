# SPDX-License-Identifier: Apache-2.0
"""The test sets: drawn scenes with one question each, never seen in training.

Training draws from seeds below ``FIRST_TEST_SEED``; a set's seed lies above it. Every scene has
one question, so that answers are independent of one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from PIL import Image

from small_vlm.language import FAMILIES, Family, Question, questions
from small_vlm.scenes import LARGE, PATCH, SIDE, SMALL, Pixels, Scene, Thing, draw, sample_scene
from testing.photo import data_url

FIRST_TEST_SEED: Final = 1_000_000
FRAMES: Final = 4


@dataclass(frozen=True)
class Item:
    """One question about one picture, or about the frames of a clip."""

    frames: tuple[Scene, ...]
    question: Question
    about: Thing | None
    """The object in question, if it is there."""

    def pictures(self) -> list[Pixels]:
        """Draw the frames."""
        return [draw(scene) for scene in self.frames]

    def frames_with_it(self) -> list[int]:
        """Return the frames that show the object in question."""
        return [i for i, scene in enumerate(self.frames) if self.about in scene.things]


def urls_of(item: Item) -> list[str]:
    """Return an item's frames as data URLs, without loss."""
    return [data_url(Image.fromarray(picture)) for picture in item.pictures()]


def plain(count: int, seed: int) -> list[Item]:
    """Scenes of three to eight objects of any size; the question families take turns."""

    def sample(rng: np.random.Generator, family: Family) -> Item | None:
        scene = sample_scene(rng, int(rng.integers(3, 9)))
        return _ask((scene,), scene, family, rng)

    return _collect(count, [seed], FAMILIES, sample)


def stress(count: int, seed: int) -> list[Item]:
    """The question is about a small object, and three to five large ones distract (Table 12)."""

    def sample(rng: np.random.Generator, family: Family) -> Item | None:
        scene = sample_scene(rng, int(rng.integers(4, 7)), radii=(SMALL, LARGE))
        # The first one drawn is the small one; the scene is in reading order by now.
        small = min(scene.things, key=lambda thing: thing.radius)
        return _ask((scene,), scene, family, rng, about=small)

    return _collect(count, [seed], ("color", "shape", "letter", "where"), sample)


def clips(count: int, seed: int) -> list[Item]:
    """Clips of four frames: some objects stay, some are in one frame only (Table 2).

    The questions ask for what something is, of an object that stays or of one that passes by.
    """

    def sample(rng: np.random.Generator, family: Family) -> Item | None:
        frames = _sample_clip(rng)
        shown = {thing for scene in frames for thing in scene.things}
        whole = replace(frames[0], things=_in_reading_order(shown))
        return _ask(frames, whole, family, rng)

    return _collect(count, [seed, 2], ("color", "shape", "letter"), sample)


def _sample_clip(rng: np.random.Generator) -> tuple[Scene, ...]:
    """Draw a clip: two to four objects stay, and each frame has one or two of its own."""
    stay = int(rng.integers(2, 5))
    passing = rng.integers(1, 3, FRAMES)
    whole = sample_scene(rng, stay + int(passing.sum()))
    shuffled = [whole.things[i] for i in rng.permutation(len(whole.things))]
    still, rest = shuffled[:stay], shuffled[stay:]
    clip = []
    for number in passing.tolist():
        own, rest = rest[:number], rest[number:]
        clip.append(replace(whole, things=_in_reading_order([*still, *own])))
    return tuple(clip)


def _in_reading_order(things: Iterable[Thing]) -> tuple[Thing, ...]:
    return tuple(sorted(things, key=lambda thing: thing.cell))


def _ask(
    frames: tuple[Scene, ...],
    whole: Scene,
    family: Family,
    rng: np.random.Generator,
    about: Thing | None = None,
) -> Item | None:
    """Return one question of a family about all objects, or ``about`` one object if given."""
    asked = [
        (question, None if question.about is None else whole.things[question.about])
        for question in questions(whole, rng)
        if question.family == family
    ]
    asked = [each for each in asked if about is None or each[1] == about]
    if not asked:
        return None
    return Item(frames, *asked[rng.integers(len(asked))])


def _collect(
    count: int,
    seed: list[int],
    families: Sequence[Family],
    sample: Callable[[np.random.Generator, Family], Item | None],
) -> list[Item]:
    """Draw until there are ``count`` questions, of the families in turn."""
    rng = np.random.default_rng([FIRST_TEST_SEED, *seed])
    items: list[Item] = []
    while len(items) < count:
        item = sample(rng, families[len(items) % len(families)])
        if item is not None:
            items.append(item)
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
