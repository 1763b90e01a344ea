# SPDX-License-Identifier: Apache-2.0
"""InternVL: the patches of each token, and text between the frames of a video."""

from typing import Any

import pytest
import torch
from torch import nn

from flashvlm_vllm.models.internvl import PrunedInternVLChat
from flashvlm_vllm.models.layouts.text_between import TextBetween

SIDE = 8
CONTEXT = 9


def model_of(version: str) -> Any:
    """Return a model with the pixel shuffle and its settings, without weights."""
    model: Any = PrunedInternVLChat.__new__(PrunedInternVLChat)
    nn.Module.__init__(model)
    model.mlp1 = nn.Linear(1, 1)
    model.ps_version = version
    model.downsample_ratio = 0.5
    model.num_image_token = SIDE * SIDE // 4
    return model


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_token_patches_match_the_pixel_shuffle(version: str) -> None:
    model = model_of(version)
    features = torch.randn(1, SIDE, SIDE, 6)
    tokens = model.pixel_shuffle(features, 0.5).reshape(SIDE * SIDE // 4, -1)
    patches = features.reshape(SIDE * SIDE, -1)
    for token, own in zip(tokens, model._patches.tolist(), strict=True):
        assert torch.equal(token, torch.cat([patches[number] for number in own]))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_token_is_a_square_of_patches_at_its_place(version: str) -> None:
    model = model_of(version)
    number = 0
    for first in range(SIDE // 2):
        for second in range(SIDE // 2):
            # Version 1, of InternVL 1.x, is in column order.
            row, column = (first, second) if version == "v2" else (second, first)
            assert model._places[number].tolist() == [row, column]
            square = {
                (2 * row + down) * SIDE + 2 * column + right for down in (0, 1) for right in (0, 1)
            }
            assert set(model._patches[number].tolist()) == square
            number += 1


@pytest.mark.parametrize(
    ("placeholder", "counts"),
    [
        ([1, CONTEXT, CONTEXT, 2, 1, 3, CONTEXT, CONTEXT, 2], [1, 2]),
        ([CONTEXT, CONTEXT, 5, 5, CONTEXT, CONTEXT], [2, 1]),
        ([1, CONTEXT, 2], [1]),
        ([7, 7, CONTEXT, 7, CONTEXT, 7, CONTEXT, 7, 7, 7], [3, 1, 4]),
    ],
)
def test_text_and_visual_tokens_are_in_the_order_of_the_prompt(
    placeholder: list[int], counts: list[int]
) -> None:
    layout = TextBetween.from_tensor(TextBetween.between(placeholder, CONTEXT).to_tensor())
    assert list(layout.ids) == [token for token in placeholder if token != CONTEXT]

    expected: list[float] = []
    left, frame, last = list(layout.ids), 0, None
    for token in placeholder:
        if token != CONTEXT:
            expected.append(float(left.pop(0)))
        elif last != CONTEXT:
            expected += [100.0 + frame] * counts[frame]
            frame += 1
        last = token

    frame_of_row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    text = torch.tensor(layout.ids, dtype=torch.float32)[:, None]
    rows = 100.0 + frame_of_row[:, None].float()
    assert layout.interleave(text, rows, frame_of_row).flatten().tolist() == expected
