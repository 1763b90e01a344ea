# SPDX-License-Identifier: Apache-2.0
"""The measurements on a real language model: scenes, packed questions, tables. No downloads."""

import json
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.language_attention.real_parts import scenes
from benchmarks.language_attention.real_parts.measure import (
    FOLDER,
    PLACES,
    Found,
    compared,
    drawn,
    patches_of,
    shares,
    with_tables,
)
from benchmarks.language_attention.real_parts.model import packed
from benchmarks.language_attention.real_parts.scenes import PLACES as NINTHS
from benchmarks.language_attention.real_parts.scenes import Thing, questions, scene


@pytest.fixture(autouse=True)
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red squares in the place of the downloaded pictures."""
    square = Image.new("RGBA", (160, 160), (255, 0, 0, 255))
    monkeypatch.setattr(scenes, "picture", lambda name: square)


def test_the_readme_has_the_tables_of_the_results() -> None:
    page = (FOLDER / "README.md").read_text()
    assert page == with_tables(page, json.loads((FOLDER / "results.json").read_text()))


def test_things_are_drawn_where_they_are_said_to_be() -> None:
    image, things = scene(random.Random(1), 224, 4, 36, 52)
    assert len({thing.name for thing in things}) == len(things) >= 2
    for thing in things:
        assert tuple(image[int(thing.y), int(thing.x)]) == (255, 0, 0)


def test_a_question_has_one_right_answer() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        _, things = scene(rng, 224, 5, 36, 52)
        names = {thing.name for thing in things}
        for asked in questions(rng, 224, things):
            word = asked.text.removesuffix("?").split()[-1]
            if asked.kind == "what":
                place = asked.text.removeprefix("What is at the ").removesuffix("?")
                assert [t.name for t in things if t.place(224) == place] == [asked.answer]
            elif asked.kind == "exist":
                assert (word in names) == (asked.answer == "yes")
            else:
                assert asked.answer in sum(NINTHS, ()) and word in names


def test_the_kinds_are_asked_in_turn_and_half_of_the_things_are_not_there() -> None:
    asked = [each for _, each in drawn(36, 52, 3, 12)]
    assert [each.kind for each in asked] == ["exist", "what", "where"] * 4
    assert [each.answer for each in asked if each.kind == "exist"] == ["yes", "no"] * 2


def test_the_area_of_a_score_that_finds_the_thing_is_1() -> None:
    thing = Thing("fox", 112.0, 64.0, 32)
    inside = patches_of(thing)
    assert inside.sum() == 4
    assert PLACES[inside].tolist() == [[3, 6], [3, 7], [4, 6], [4, 7]]
    found = Found()
    found.area("right", "what", inside.float(), thing)
    found.area("blind", "what", torch.zeros(len(PLACES)), thing)
    found.area("wrong", "what", -inside.float(), thing)
    assert [found.areas[row]["what"] for row in ("right", "blind", "wrong")] == [
        [1.0],
        [0.5],
        [0.0],
    ]


def test_shares_are_of_all_questions_and_of_each_kind() -> None:
    assert shares("110010", "001122") == [0.5, 1.0, 0.0, 0.5]
    sets = {"a": {"right": {"x": {"44": "1111110"}, "y": {"44": "0000000"}}}}
    assert compared(sets, "x", "y", 44) == "+0.857, p = 0.031"


def test_packed_questions_see_the_picture_and_themselves() -> None:
    def ids(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    model: Any = SimpleNamespace(
        before=[1], template=[2, 3], end=[4], ids=ids, question=lambda text: ids(f"\n{text}")
    )
    own = packed(model, 5, [("a?", "b"), ("c?", "de")])
    assert own.ids == [10, 97, 63, 2, 3, 98, 10, 99, 63, 2, 3, 100, 101]
    assert own.groups == [0] * 6 + [1] * 6 + [2] * 7
    assert own.positions == [*range(6), *range(6, 12), *range(6, 13)]
    # A token's logits are at the place before it; the answers are "b" and "de", each with an end.
    assert own.targets == [(10, 98), (11, 4), (16, 100), (17, 101), (18, 4)]
    assert own.lengths == [2, 3]
