# SPDX-License-Identifier: Apache-2.0
"""Properties of every selection for arbitrary inputs; hypothesis generates the examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashvlm_vllm.selection import (
    ABLATIONS,
    VIDEO,
    LanguageAttention,
    SelectionConfig,
    VisualTokens,
    fused_scores,
    run_selector,
    run_selector_many,
    select_visual_tokens,
    select_visual_tokens_ragged,
)
from flashvlm_vllm.selection.registry import BUILT_IN

CONFIGS = {
    "published": SelectionConfig(),
    "small rounds": SelectionConfig(removed_per_round=3, important_fraction=0.25),
    "video": replace(VIDEO, block_length=8),
    **ABLATIONS,
}
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BROKEN = (math.nan, math.inf, -math.inf, 1e38, -1e38, 1e-40, 0.0)

Draw = Callable[..., Tensor]
Arguments = tuple[Tensor, Tensor | None, Tensor | None, int, Tensor | None]


def draw_of(seed: int, kind: str, dtype: torch.dtype = torch.float32) -> Draw:
    """Return a generator of tensors of one kind; `broken` ones contain NaN, infinity or similar."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if kind == "equal":
            return torch.ones(shape, dtype=dtype)
        if kind == "ties":
            return torch.randint(-1, 2, shape, generator=random).to(dtype)
        values = torch.randn(shape, generator=random)
        if kind == "broken" and values.numel():
            places = torch.randint(0, values.numel(), (1 + values.numel() // 9,), generator=random)
            picks = torch.randint(0, len(BROKEN), places.shape, generator=random)
            values.view(-1)[places] = torch.tensor(BROKEN)[picks]
        return values.to(dtype)

    return draw


KINDS = st.sampled_from(["plain", "ties", "equal", "broken"])


@st.composite
def arguments(draw: st.DrawFn, *, kinds: st.SearchStrategy[str] = KINDS) -> Arguments:
    """Generate arguments of `select_visual_tokens`."""
    made = draw_of(draw(st.integers(0, 2**20)), draw(kinds), draw(st.sampled_from(FLOATS)))
    count, width = draw(st.integers(1, 90)), draw(st.integers(1, 20))
    words = draw(st.one_of(st.none(), st.integers(0, 7)))
    return (
        made(count, width),
        made(count).abs() if draw(st.booleans()) else None,
        None if words is None else made(words, width),
        draw(st.one_of(st.integers(1, count), st.integers(1, 2 * count), st.just(10**9))),
        made(count, draw(st.integers(1, 20))) if draw(st.booleans()) else None,
    )


def assert_fits(kept: Tensor, count: int, budget: int) -> None:
    """Check that the indices are exact in number, ascending, distinct and int64."""
    assert kept.dtype == torch.int64
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == min(budget, count)
    assert kept[0] >= 0 and kept[-1] < count


@settings(max_examples=150, deadline=None)
@given(arguments(), st.sampled_from(sorted(CONFIGS)))
def test_selections_are_exact_ascending_and_deterministic(given_to: Arguments, name: str) -> None:
    kept = select_visual_tokens(*given_to, CONFIGS[name])
    assert_fits(kept, len(given_to[0]), given_to[3])
    assert torch.equal(kept, select_visual_tokens(*given_to, CONFIGS[name]))


@settings(max_examples=60, deadline=None)
@given(st.lists(arguments(), min_size=1, max_size=5), st.sampled_from(sorted(CONFIGS)))
def test_images_in_a_batch_keep_the_same_tokens_as_alone(
    images: list[Arguments], name: str
) -> None:
    columns = [list(column) for column in zip(*images, strict=True)]
    together = select_visual_tokens_ragged(*columns, CONFIGS[name])
    for image, kept in zip(images, together, strict=True):
        assert torch.equal(kept, select_visual_tokens(*image, CONFIGS[name]))


@settings(max_examples=100, deadline=None)
@given(arguments(), st.sampled_from(sorted(CONFIGS)))
def test_scores_are_finite_and_between_0_and_1(given_to: Arguments, name: str) -> None:
    scores = fused_scores(*given_to[:3], CONFIGS[name])
    assert scores.dtype == torch.float32
    assert scores.shape == (len(given_to[0]),)
    assert bool(((scores >= 0) & (scores <= 1)).all())


@settings(max_examples=40, deadline=None)
@given(arguments(kinds=st.just("equal")))
def test_equal_tokens_keep_the_first_ones(given_to: Arguments) -> None:
    # Without words: rows of a matrix product may differ in their last bits even for equal inputs.
    features, saliency, _, budget, compared = given_to
    everything = SelectionConfig(important_fraction=1.0)
    kept = select_visual_tokens(features, saliency, None, budget, compared, everything)
    assert kept.tolist() == list(range(min(given_to[3], len(given_to[0]))))


@settings(max_examples=40, deadline=None)
@given(arguments(kinds=st.just("plain")))
def test_arguments_are_not_modified(given_to: Arguments) -> None:
    before = [each.clone() if isinstance(each, Tensor) else each for each in given_to]
    select_visual_tokens(*given_to)
    for one, other in zip(before, given_to, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


@st.composite
def visual_tokens(draw: st.DrawFn, kinds: st.SearchStrategy[str] = KINDS) -> VisualTokens:
    """Generate one image or video in the form that selectors receive."""
    seed = draw(st.integers(0, 2**20))
    made = draw_of(seed, draw(kinds))
    rows, columns, steps = draw(st.integers(1, 7)), draw(st.integers(2, 7)), draw(st.integers(1, 3))
    count = rows * columns * steps
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).repeat(steps, 1)
    words = draw(st.integers(0, 5))
    mean, read = made(words + 2, count), made(2 * (words + 2), count).unflatten(0, (2, -1))
    return VisualTokens(
        budget=draw(st.integers(1, count - 1)),
        projected=made(count, 12),
        features=made(count, 8),
        saliency=made(count).abs(),
        text=made(words, 12) if words else None,
        keys=made(count, 2, 4),
        places=places,
        seed=seed,
        times=torch.arange(steps).repeat_interleave(rows * columns) if steps > 1 else None,
        attention=LanguageAttention(mean, read, words) if draw(st.booleans()) else None,
    )


@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=40, deadline=None)
@given(given_to=visual_tokens())
def test_every_selector_is_exact_and_deterministic(name: str, given_to: VisualTokens) -> None:
    selector = BUILT_IN[name]
    # Trusted, as when served: the checks for third-party selectors must not be needed.
    first, second = (run_selector(name, selector, given_to, trusted=True) for _ in range(2))
    if selector.merges:
        assert first.merged is not None and second.merged is not None
        assert first.merged.shape == (given_to.budget, given_to.features.shape[1])
        assert torch.equal(first.merged.nan_to_num(), second.merged.nan_to_num())
    else:
        assert first.indices is not None and second.indices is not None
        assert_fits(first.indices, len(given_to.projected), given_to.budget)
        assert torch.equal(first.indices, second.indices)


@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=25, deadline=None)
@given(images=st.lists(visual_tokens(), min_size=1, max_size=4))
def test_every_selector_treats_images_in_a_batch_as_alone(
    name: str, images: list[VisualTokens]
) -> None:
    together = run_selector_many(name, BUILT_IN[name], images, trusted=True)
    for image, chosen in zip(images, together, strict=True):
        alone = run_selector(name, BUILT_IN[name], image, trusted=True)
        for one, other in ((alone.indices, chosen.indices), (alone.merged, chosen.merged)):
            assert (one is None) == (other is None)
            assert one is None or other is None or torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("name", [name for name, each in BUILT_IN.items() if each.merges])
@settings(max_examples=40, deadline=None)
@given(given_to=visual_tokens(st.sampled_from(["plain", "ties", "equal"])))
def test_merged_tokens_are_finite(name: str, given_to: VisualTokens) -> None:
    merged = run_selector(name, BUILT_IN[name], given_to, trusted=False).merged
    assert merged is not None
    assert merged.isfinite().all()
