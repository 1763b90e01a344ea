# SPDX-License-Identifier: Apache-2.0
"""Prompts are read in groups that fit the memory that was profiled, and laid out as vLLM's are."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")

from flashvlm_vllm.worker.item_prompt import Prompt, in_row
from flashvlm_vllm.worker.question_attention import _groups


def prompt(tokens: int, *, deeper: bool = False, axes: int = 1) -> Prompt:
    rows = torch.arange(tokens * 2.0).view(tokens, 2)
    positions = torch.arange(tokens)[:, None].expand(-1, axes)
    before, after = torch.full((2, 2), -1.0), torch.full((3, 2), -2.0)
    every = torch.arange(tokens)
    return Prompt(rows, before, after, 1, positions, every, rows + 100 if deeper else None)


@pytest.mark.parametrize(
    ("tokens", "most", "expected"),
    [
        ([], 20, []),
        ([5, 5], 20, [[5, 5]]),  # each with five words
        ([5, 6], 20, [[5], [6]]),
        ([5, 5, 5, 5, 5], 20, [[5, 5], [5, 5], [5]]),
        ([99], 20, [[99]]),
        ([1, 99, 1, 1], 20, [[1], [99], [1, 1]]),
    ],
)
def test_groups_are_consecutive_and_as_large_as_allowed(
    tokens: list[int], most: int, expected: list[list[int]]
) -> None:
    groups = list(_groups([prompt(each) for each in tokens], most))
    assert [[len(each.visual) for each in group] for group in groups] == expected
    assert all(len(group) == 1 or sum(map(len, group)) <= most for group in groups)


def test_words_after_an_item_follow_its_largest_position() -> None:
    grid = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]])
    words = torch.zeros(2, 2)
    made = Prompt(torch.zeros(4, 2), words, words, 1, grid, torch.arange(4))
    assert made.all_positions().T.tolist() == [
        *([each] * 3 for each in (0, 1)),
        *[[2, 2, 2], [2, 2, 3], [2, 3, 2], [2, 3, 3]],
        *([each] * 3 for each in (4, 5)),
    ]
    assert prompt(3).all_positions().tolist() == [list(range(8))]


def test_what_a_layer_adds_lies_at_the_visual_tokens() -> None:
    made = prompt(2, deeper=True)
    assert made.embeddings().tolist()[2:4] == [[0, 1], [2, 3]]
    assert made.added().tolist() == [[0, 0]] * 2 + [[100, 101], [102, 103]] + [[0, 0]] * 3
    assert not prompt(2).added().any()


def test_tokens_that_do_not_pass_the_first_layer_are_left_out() -> None:
    made = prompt(5)
    assert made.carried().places.tolist() == list(range(10))
    assert made.left_out().tolist() == []
    half = replace(made, passing=torch.tensor([0, 2, 3]))
    carried = half.carried()
    assert carried.places.tolist() == [0, 1, 2, 4, 5, 7, 8, 9]
    assert half.left_out().tolist() == [3, 6]
    assert carried.words().tolist() == [0, 1, 5, 6, 7]
    assert carried.places[carried.image].tolist() == [2, 4, 5]
    assert in_row([carried.words(), carried.words()], [8, 8]).tolist() == [
        *[0, 1, 5, 6, 7],
        *[8, 9, 13, 14, 15],
    ]
