# SPDX-License-Identifier: Apache-2.0
"""Patches of the last encoder attention are assigned to tokens."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import MMEncoderAttention

from flashvlm_vllm.models.general.saliency import LastAttention
from flashvlm_vllm.vision.attention import cls_attention, received_attention

HEADS, WIDTH = 2, 4


class Tower(nn.Module):
    """Two layers of attention, of which the second is the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = MMEncoderAttention(HEADS, WIDTH)
        self.second = MMEncoderAttention(HEADS, WIDTH)

    def forward(self, states: Tensor, bounds: Tensor | None = None) -> Tensor:
        self.first(states, states, states, cu_seqlens=bounds)
        return self.second(2 * states, 2 * states, states, cu_seqlens=bounds)


class Packing(Tower):
    """A tower that packs the patches of a token one after another."""

    spatial_merge_size = 2

    def rot_pos_emb(self) -> None:
        """Return nothing; the name marks such a tower."""


@pytest.fixture(autouse=True)
def config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


def seen(tower: Tower, states: Tensor, sizes: list[int], bounds: Tensor | None = None):  # type: ignore[no-untyped-def]
    last = LastAttention(tower.modules())
    assert not last.is_known
    with last.learn():
        tower(states, bounds)
    with last.listen() as calls:
        tower(states, bounds)
    found = last.of_tokens(calls, sizes)
    assert last.was_mapped is (found is not None)
    return found


def states(images: int, patches: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, patches, HEADS * WIDTH, generator=generator)


def heads(values: Tensor) -> Tensor:
    return 2 * values.unflatten(2, (HEADS, WIDTH))


SCALE = WIDTH**-0.5


def test_a_token_per_patch() -> None:
    given = states(2, 9)
    found = seen(Tower(), given, [9, 9])
    expected = received_attention(heads(given), heads(given), SCALE) / HEADS
    torch.testing.assert_close(torch.stack(found), expected)


def test_a_class_token_is_left_out_and_its_attention_is_the_saliency() -> None:
    given = states(2, 10)
    found = seen(Tower(), given, [9, 9])
    expected = cls_attention(heads(given), heads(given), SCALE)[:, 1:] / HEADS
    torch.testing.assert_close(torch.stack(found), expected)


def test_squares_of_patches_are_averaged() -> None:
    given = states(1, 16)
    (found,) = seen(Tower(), given, [4])
    own = received_attention(heads(given), heads(given), SCALE)[0] / HEADS
    grid = own.view(4, 4)
    expected = [grid[:2, :2], grid[:2, 2:], grid[2:, :2], grid[2:, 2:]]
    torch.testing.assert_close(found, torch.stack([each.mean() for each in expected]))


def test_items_packed_into_one_sequence_attend_to_themselves() -> None:
    given = states(1, 24)
    bounds = torch.tensor([0, 16, 24], dtype=torch.int32)
    found = seen(Packing(), given, [4, 2], bounds)
    for own, (start, end) in zip(found, ((0, 16), (16, 24)), strict=True):
        alone = heads(given)[:, start:end]
        patches = received_attention(alone, alone, SCALE)[0] / HEADS
        torch.testing.assert_close(own, patches.view(-1, 4).mean(dim=1))


@pytest.mark.parametrize(
    ("tower", "patches", "sizes", "bounds"),
    [
        (Tower, 24, [5], None),  # no square of patches per token
        (Tower, 8, [2], None),  # squares of an image that is not square
        (Tower, 16, [4], [0, 16]),  # packed in an order that is not known
    ],
)
def test_what_cannot_be_assigned_has_no_saliency(
    tower: type[Tower], patches: int, sizes: list[int], bounds: list[int] | None
) -> None:
    packed = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    assert seen(tower(), states(1, patches), sizes, packed) is None


def test_a_model_without_encoder_attention_has_no_saliency() -> None:
    last = LastAttention(nn.Linear(2, 2).modules())
    assert last.is_known
    with last.listen() as calls:
        pass
    assert last.of_tokens(calls, [4]) is None


def test_a_tower_that_reorders_patches_has_no_saliency() -> None:
    tower = Tower()
    tower.get_window_index = lambda: None  # type: ignore[assignment]
    assert LastAttention(tower.modules()).is_known
