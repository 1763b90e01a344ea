# SPDX-License-Identifier: Apache-2.0
"""The selection on a GPU: no device synchronisation, same rounds as in torch, time limits."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from flashvlm_vllm.selection import (
    VIDEO,
    SelectionConfig,
    select_visual_tokens,
    select_visual_tokens_ragged,
)
from flashvlm_vllm.selection.partition import remove_near_duplicates


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Batch:
    """Images of random features; `select` takes all of them in one call."""

    def __init__(self, counts: list[int], seed: int = 0, dtype: torch.dtype = torch.float32):
        random = torch.Generator("cuda").manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, device="cuda").to(dtype)

        self.projected = [draw(count, 4096) for count in counts]
        self.features = [draw(count, 1024) for count in counts]
        self.saliency: list[Tensor | None] = [draw(count).softmax(0) for count in counts]
        self.text: list[Tensor | None] = [
            draw(20 + number % 7, 4096) for number in range(len(counts))
        ]

    def select(self, budgets: list[int], config: SelectionConfig | None = None) -> list[Tensor]:
        return select_visual_tokens_ragged(
            self.projected,
            self.saliency,
            self.text,
            budgets,
            self.features,
            config or SelectionConfig(),
        )


@pytest.mark.parametrize("config", [SelectionConfig(), VIDEO], ids=["fixed", "geometric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_selection_does_not_synchronise_with_the_device(
    config: SelectionConfig, dtype: torch.dtype
) -> None:
    counts, budgets = [576, 576, 300, 1200, 9], [64, 128, 300, 77, 4]
    batch = Batch(counts, dtype=dtype)
    batch.text[1] = None
    batch.saliency[3] = None
    batch.features[0][5] = torch.nan
    batch.select(budgets, config)  # kernels are compiled at their first launch
    with no_waiting():
        kept = batch.select(budgets, config)
    for count, budget, indices in zip(counts, budgets, kept, strict=True):
        chosen = indices.tolist()
        assert len(chosen) == budget
        assert chosen == sorted(set(chosen)) and chosen[0] >= 0 and chosen[-1] < count


def test_repeated_runs_select_the_same_tokens() -> None:
    batch = Batch([576] * 8)
    first, second = batch.select([64] * 8), batch.select([64] * 8)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_exact_inputs_select_the_same_tokens_as_on_the_cpu() -> None:
    """Entries of +-1, widths powers of four: norms and cosines have no rounding."""
    random = torch.Generator().manual_seed(0)
    counts, budgets = [576, 400, 577, 33], [64, 101, 32, 8]
    features = [torch.randint(0, 2, (n, 64), generator=random) * 2.0 - 1 for n in counts]
    saliency: list[Tensor | None] = [
        torch.randint(0, 9, (n,), generator=random).float() for n in counts
    ]
    text: list[Tensor | None] = [None] * len(counts)
    on_gpu = select_visual_tokens_ragged(
        [each.cuda() for each in features],
        [None if each is None else each.cuda() for each in saliency],
        text,
        budgets,
    )
    for number, kept in enumerate(on_gpu):
        expected = select_visual_tokens(features[number], saliency[number], None, budgets[number])
        assert kept.tolist() == expected.tolist()


@pytest.mark.parametrize("removed_per_round", [1, 8, 64])
@pytest.mark.parametrize("width", [16, 544, 560, 1000, 2560])
def test_the_kernel_equals_the_loop_in_torch(width: int, removed_per_round: int) -> None:
    from flashvlm_vllm.selection.kernels.rounds import remove_near_duplicates_batched

    random = torch.Generator("cuda").manual_seed(width)
    features = torch.randint(-2, 3, (4, width, 6), generator=random, device="cuda").float()
    similarity = features @ features.mT
    similarity[0] = torch.randn(width, width, generator=random, device="cuda")
    lengths = [width, width - 1, width // 2 + 1, width]
    keeps = [max(1, width // 9), 1, width // 2 + 1, width - 3]
    kept = remove_near_duplicates_batched(
        similarity,
        torch.tensor(lengths, device="cuda"),
        torch.tensor(keeps, device="cuda"),
        max(keeps),
        removed_per_round,
    )
    for row, (length, keep) in enumerate(zip(lengths, keeps, strict=True)):
        expected = remove_near_duplicates(
            similarity[row, :length, :length], keep, removed_per_round
        )
        assert torch.equal(kept[row, :keep], expected)


def milliseconds(call: Callable[[], object]) -> float:
    """Return the median time between two events, including the host's launches."""
    for _ in range(5):
        call()
    times = []
    for _ in range(30):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


@pytest.mark.parametrize(
    ("counts", "budget", "allowed_ms"),
    [([576], 64, 0.5), ([576] * 32, 64, 2.0), ([576] * 5, 128, 1.5), ([2880], 640, 1.5)],
    ids=["one image", "32 images", "five crops", "2880 as one list"],
)
def test_the_selection_meets_its_time_limits(
    counts: list[int], budget: int, allowed_ms: float
) -> None:
    batch = Batch(counts, dtype=torch.bfloat16)
    assert milliseconds(lambda: batch.select([budget] * len(counts))) <= allowed_ms
