# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashvlm_vllm.models.layouts.anyres import tile_patches
from flashvlm_vllm.request.budget import spread_budget


@given(st.lists(st.integers(1, 600), min_size=1, max_size=7), st.data())
def test_shares_sum_to_the_budget_and_fit_the_crops(sizes: list[int], data: st.DataObject) -> None:
    budget = data.draw(st.integers(1, sum(sizes)))
    shares = spread_budget(budget, sizes)
    assert sum(shares) == budget
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    exact = [budget * size / sum(sizes) for size in sizes]
    assert all(abs(share - fair) < 1 for share, fair in zip(shares, exact, strict=True))


@pytest.mark.parametrize(("budget", "share"), [(640, 128), (320, 64), (160, 32)])
def test_equal_crops_get_equal_shares_as_published(budget: int, share: int) -> None:
    assert spread_budget(budget, [576] * 5) == [share] * 5


def test_the_remainder_goes_to_the_base_crop_first() -> None:
    assert spread_budget(1, [576] * 5) == [1, 0, 0, 0, 0]
    assert spread_budget(7, [576] * 5) == [2, 2, 1, 1, 1]


def test_tiles_are_read_in_raster_order_of_the_picture() -> None:
    # 2 x 2 tiles of 2 x 2 patches: the first picture row has patches of both upper tiles.
    patches = tile_patches((2, 2), 2, (100, 100)).tolist()
    assert patches == [4, 5, 8, 9, 6, 7, 10, 11, 12, 13, 16, 17, 14, 15, 18, 19]


@pytest.mark.parametrize(("size", "left"), [((100, 100), 16), ((50, 100), 8), ((100, 50), 8)])
def test_patches_of_padding_are_excluded(size: tuple[int, int], left: int) -> None:
    patches = tile_patches((2, 2), 2, size)
    assert len(patches) == len(set(patches.tolist())) == left
