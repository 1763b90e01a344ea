# SPDX-License-Identifier: Apache-2.0
"""The PNG of kept patches: checks of its pixels."""

import io
from typing import Any

import numpy as np
from PIL import Image

from flashvlm_vllm.explain.drawing import draw

GREEN = (0, 200, 0)


def part(kept: list[list[int]], region: Any = (0.0, 0.0, 1.0, 1.0), **fields: Any) -> Any:
    scores = [[0.0, 0.5], [1.0, None]]
    return {
        "frame": 0,
        "rows": 2,
        "columns": 2,
        "region": region,
        "kept": kept,
        "fused": scores,
        **fields,
    }


def pixels(*items: Any) -> Any:
    png = draw(items)
    assert png.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(png)))


def test_dropped_patches_are_dark_and_kept_patches_are_not() -> None:
    picture = Image.new("RGB", (200, 100), GREEN)
    sheet = pixels(({"parts": [part([[0, 1]])]}, [picture]))
    assert sheet.shape == (6 + 336 + 6, 6 + 672 + 6, 3)
    inside = sheet[6:-6, 6:-6]
    assert tuple(inside[84, 504]) == GREEN  # centre of the upper right quarter
    for row, column in ((84, 168), (252, 168), (252, 504)):
        assert inside[row, column].max() < 100


def test_the_region_places_the_grid_in_the_picture() -> None:
    picture = Image.new("RGB", (200, 100), GREEN)
    sheet = pixels(({"parts": [part([[0, 0]], region=(0.25, 0.0, 0.75, 1.0))]}, [picture]))[6:, 6:]
    assert tuple(sheet[84, 252]) == GREEN
    assert sheet[84, 84].max() < 100


def test_tiles_share_a_panel_and_the_base_crop_has_its_own() -> None:
    picture = Image.new("RGB", (100, 100), GREEN)
    parts = [
        part([]),
        part([[0, 0]], region=(0.0, 0.0, 0.503, 1.0)),
        part([[0, 1]], region=(0.5, 0.0, 1.0, 1.0)),
    ]
    sheet = pixels(({"parts": parts}, [picture]))
    assert sheet.shape[1] == 6 + 2 * 678
    assert not (sheet[:, :678] == GREEN).all(axis=2).any()
    second = sheet[6:, 684:]
    assert tuple(second[100, 84]) == GREEN
    assert tuple(second[100, 588]) == GREEN


def test_frames_are_arranged_in_a_grid() -> None:
    frames = np.zeros((4, 50, 100, 3), np.uint8)
    frames[:, :, :, 1] = 200
    parts = [part([[0, 0]] if frame == 3 else [], frame=frame) for frame in range(4)]
    sheet = pixels(({"parts": parts}, list(frames)))
    half_high, half_wide = sheet.shape[0] // 2, sheet.shape[1] // 2
    is_kept = (sheet == GREEN).all(axis=2)
    assert is_kept[half_high:, half_wide:].any()
    assert not is_kept[:half_high].any()
    assert not is_kept[:, :half_wide].any()


def test_without_a_region_the_scores_are_drawn() -> None:
    sheet = pixels(({"parts": [part([[1, 0]], region=None)]}, [Image.new("RGB", (9, 9))]))
    inside = sheet[6:-6, 6:-6]
    assert [inside[168, 168].max(), inside[168, 504].max()] == [0, 127]
    assert inside[504, 168].min() == 255


def test_the_picture_of_a_long_video_has_a_bounded_size() -> None:
    frames = [np.zeros((32, 64, 3), np.uint8)] * 500
    parts = [part([], frame=frame) for frame in range(500)]
    assert max(pixels(({"parts": parts}, frames)).shape) <= 2100
