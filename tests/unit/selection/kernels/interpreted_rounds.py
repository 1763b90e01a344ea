# SPDX-License-Identifier: Apache-2.0
"""The kernel of Algorithm 1 against the torch implementation, in Triton's interpreter.

``test_kernels.py`` runs this file in a separate process: the interpreter must be chosen before
the kernel is imported, for the whole process. ``tests/gpu`` runs the same cases compiled.
"""

from __future__ import annotations

import pytest
import torch

from flashvlm_vllm.selection.kernels.rounds import remove_near_duplicates_batched
from flashvlm_vllm.selection.partition import remove_near_duplicates

DEFAULT = (32, 256, 256, 32)
SEVERAL_BLOCKS = (8, 32, 16, 8)


@pytest.mark.parametrize("tile", [DEFAULT, SEVERAL_BLOCKS])
@pytest.mark.parametrize(
    ("removed_per_round", "values"),
    [
        (1, "ties"),
        (3, "all_alike"),
        (8, "ties"),
        (8, "distinct"),
        (8, "negative"),
        (64, "ties"),
        (64, "distinct"),
    ],
)
def test_the_kernel_equals_the_loop_in_torch(
    tile: tuple[int, int, int, int], removed_per_round: int, values: str
) -> None:
    lengths = [48, 33, 1, 15, 16, 2, 47, 40]
    keeps = [1, 33, 1, 3, 8, 1, 46, 0]
    random = torch.Generator().manual_seed(removed_per_round)
    if values == "distinct":
        similarity = torch.randn(8, 48, 48, generator=random)
    else:
        features = torch.randint(-2, 3, (8, 48, 4), generator=random).float()
        similarity = features @ features.mT
        if values == "all_alike":
            similarity = torch.zeros_like(similarity)
        if values == "negative":
            similarity -= 100
    kept = remove_near_duplicates_batched(
        similarity,
        torch.tensor(lengths),
        torch.tensor(keeps),
        max(keeps),
        removed_per_round,
        tile=tile,
    )
    assert kept.shape == (8, 46) and kept.dtype == torch.int64
    for row, (length, keep) in enumerate(zip(lengths, keeps, strict=True)):
        expected = remove_near_duplicates(
            similarity[row, :length, :length], keep, removed_per_round
        )
        assert kept[row, :keep].tolist() == expected.tolist()


def test_entries_beyond_the_length_of_a_list_are_ignored() -> None:
    similarity = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(0))
    lengths, keeps = torch.tensor([21]), torch.tensor([5])
    expected = remove_near_duplicates(similarity[0, :21, :21], 5, 2).tolist()
    similarity[:, 21:] = 1e9
    similarity[:, :, 21:] = 1e9
    kept = remove_near_duplicates_batched(similarity, lengths, keeps, 5, 2)
    assert kept[0].tolist() == expected


def test_the_kernel_equals_the_loop_in_torch_for_a_long_list() -> None:
    similarity = torch.rand(1, 544, 544, generator=torch.Generator().manual_seed(1))
    kept = remove_near_duplicates_batched(
        similarity, torch.tensor([543]), torch.tensor([500]), 500, 8
    )
    expected = remove_near_duplicates(similarity[0, :543, :543], 500, 8)
    assert torch.equal(kept[0], expected)
