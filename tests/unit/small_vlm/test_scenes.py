# SPDX-License-Identifier: Apache-2.0
"""The drawn scenes: pictures agree with their descriptions and questions."""

from typing import get_args

import numpy as np
import pytest

from small_vlm.language import (
    FAMILIES,
    WORDS,
    Family,
    Question,
    description,
    name_of,
    place_of,
    questions,
)
from small_vlm.scenes import (
    CELL,
    COLORS,
    IMAGE_SIZE,
    KINDS,
    LETTERS,
    Scene,
    Thing,
    draw,
    sample_scene,
    sprite,
)


def some_scenes(count: int = 60) -> list[Scene]:
    rng = np.random.default_rng(0)
    return [sample_scene(rng, int(rng.integers(1, 10))) for _ in range(count)]


def test_a_scene_is_always_drawn_alike_and_two_scenes_differ() -> None:
    first, second = some_scenes(2)
    assert draw(first).shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert np.array_equal(draw(first), draw(first))
    assert not np.array_equal(draw(first), draw(second))


def test_every_object_has_a_cell_of_its_own() -> None:
    for scene in some_scenes():
        cells = [thing.cell for thing in scene.things]
        assert cells == sorted(set(cells))
        for thing in scene.things:
            row, column = thing.cell
            left, top, right, bottom = thing.box
            assert column * CELL <= left < right <= (column + 1) * CELL
            assert row * CELL <= top < bottom <= (row + 1) * CELL


def test_an_object_has_its_colour_in_its_box() -> None:
    for scene in some_scenes():
        picture = draw(scene).astype(float)
        for thing in scene.things:
            left, top, right, bottom = thing.box
            inside = picture[top:bottom, left:right][sprite(thing.kind, thing.radius) > 0.99]
            nearest = min(COLORS, key=lambda name: np.abs(inside.mean(0) - COLORS[name]).sum())
            assert nearest == thing.color


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_look_different_at_the_smallest_size(kind: str) -> None:
    for other in KINDS:
        if other != kind:
            assert np.abs(sprite(kind, 8) - sprite(other, 8)).mean() > 0.05, other


def test_a_part_of_the_canvas_has_the_right_position() -> None:
    rng = np.random.default_rng(1)
    scene = sample_scene(rng, 4, cells=2, origin=(2, 1))
    assert draw(scene).shape == (2 * CELL, 2 * CELL, 3)
    assert {thing.cell for thing in scene.things} == {(2, 1), (2, 2), (3, 1), (3, 2)}
    assert {place_of(thing) for thing in scene.things} == {"bottom left", "bottom right"}


def fits(thing: Thing, question: Question) -> bool:
    """Return whether the words of a question match an object."""
    text = question.text.split()
    is_letter = thing.kind in LETTERS
    if question.family in ("color", "where", "side"):
        return thing.kind in text
    if question.family == "exist":
        return thing.kind in text and thing.color in text
    return thing.color in text and is_letter is (question.family == "letter")


def test_every_question_has_exactly_one_correct_answer() -> None:
    rng = np.random.default_rng(2)
    seen = set()
    for scene in some_scenes():
        for question in questions(scene, rng):
            seen.add(question.family)
            matching = [thing for thing in scene.things if fits(thing, question)]
            if question.family == "exist":
                assert question.answer == ("yes" if matching else "no")
                continue
            (thing,) = matching
            assert scene.things[question.about or 0] == thing
            expected = {
                "color": thing.color,
                "where": place_of(thing),
                "side": place_of(thing).split()["left" in question.text],
                "shape": thing.kind,
                "letter": thing.kind,
            }
            assert question.answer == expected[question.family]
    assert seen == set(get_args(Family))
    assert set(FAMILIES) < seen


def test_yes_and_no_are_equally_frequent() -> None:
    rng = np.random.default_rng(3)
    answers = [
        question.answer
        for scene in some_scenes()
        for question in questions(scene, rng)
        if question.family == "exist"
    ]
    assert answers.count("yes") == answers.count("no")


def test_all_words_are_in_the_vocabulary() -> None:
    rng = np.random.default_rng(4)
    for scene in some_scenes():
        texts = [description(scene)]
        texts += [f"{question.text} {question.answer}" for question in questions(scene, rng)]
        assert set(" ".join(texts).split()) <= set(WORDS)
        assert all(name_of(thing.kind) in texts[0] for thing in scene.things)
