# SPDX-License-Identifier: Apache-2.0
"""A video's budget: over the whole clip, with at least one token per time step."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")

from flashvlm_vllm.selection import Selection, Selector, VisualTokens, run_selector_many
from flashvlm_vllm.worker import choose
from flashvlm_vllm.worker.candidates import Candidates, Part
from flashvlm_vllm.worker.video_budget import first_of_each

FRAMES, TOKENS = 6, 20


def clip(budget: int, selector: str = "flashvlm", seed: int = 0) -> Candidates:
    draw = torch.Generator().manual_seed(seed)
    count = FRAMES * TOKENS
    place = torch.arange(TOKENS).repeat(FRAMES)
    projected = torch.randn(count, 8, generator=draw)
    features = torch.randn(count, 6, generator=draw)
    saliency = torch.rand(count, generator=draw)
    text = torch.randn(3, 8, generator=draw)
    part = Part(
        projected=projected,
        features=features,
        saliency=saliency,
        keys=torch.randn(count, 2, 4, generator=draw),
        places=torch.stack([place // 5, place % 5], dim=1),
        frames=FRAMES,
    )
    return Candidates(part, selector, bytes([seed] * 32), budget, text)


def kept(candidates: Candidates) -> torch.Tensor:
    (selection,) = choose.choose([candidates])
    assert selection.indices is not None
    return selection.indices


@pytest.mark.parametrize("name", ["flashvlm", "flashvlm-2", "vispruner", "divprune", "uniform"])
@pytest.mark.parametrize("budget", [FRAMES, FRAMES + 1, 31, FRAMES * TOKENS - 1])
def test_every_time_step_keeps_a_token_and_the_count_is_exact(name: str, budget: int) -> None:
    indices = kept(clip(budget, name))
    assert len(indices) == len(indices.unique()) == budget
    assert indices.equal(indices.sort().values)
    assert (indices // TOKENS).unique().tolist() == list(range(FRAMES))


def test_a_budget_of_one_token_per_step_keeps_the_most_salient_ones() -> None:
    candidates = clip(FRAMES)
    for frame, index in enumerate(kept(candidates).tolist()):
        own = candidates.part.saliency[frame * TOKENS : (frame + 1) * TOKENS]
        assert index == frame * TOKENS + int(own.argmax())


def test_equal_saliencies_keep_the_lower_index_and_non_finite_ones_lose() -> None:
    saliency = torch.tensor([1.0, 2.0, 2.0, torch.nan, 0.5, 0.5, torch.inf, -1.0, 0.1])
    assert first_of_each(saliency, 3).tolist() == [1, 4, 8]
    assert first_of_each(torch.full((4,), torch.nan), 2).tolist() == [0, 2]


def test_the_remaining_budget_goes_to_the_frames_that_change() -> None:
    """All frames but one show the same picture; the selector chooses over the whole clip."""
    candidates = clip(FRAMES + 10)
    scores = torch.zeros(FRAMES, TOKENS)
    scores[4] = torch.arange(TOKENS)

    def most_salient(tokens: VisualTokens) -> torch.Tensor:
        return tokens.saliency.argsort(descending=True, stable=True)[: tokens.budget]

    selector = Selector(most_salient)
    chosen = choose.choose_of_clip(
        VisualTokens(
            budget=candidates.budget,
            projected=candidates.part.projected,
            features=candidates.part.features,
            saliency=scores.flatten(),
            text=None,
            keys=None,
            places=candidates.part.places,
            seed=0,
            times=torch.arange(FRAMES * TOKENS) // TOKENS,
        ),
        FRAMES,
        selector,
        lambda tokens: run_selector_many("test", selector, tokens, trusted=False),
    )
    assert chosen.indices is not None
    by_frame = (chosen.indices // TOKENS).bincount(minlength=FRAMES)
    assert by_frame.tolist() == [1, 1, 1, 1, 11, 1]


def test_a_selector_receives_the_time_step_of_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[VisualTokens] = []

    def first(tokens: VisualTokens) -> torch.Tensor:
        seen.append(tokens)
        return torch.arange(tokens.budget)

    monkeypatch.setattr(choose, "find_selector", lambda name: Selector(first))
    candidates = clip(FRAMES + 3, "other")
    kept(candidates)
    (tokens,) = seen
    assert tokens.times is not None
    rest = [
        index
        for index in range(FRAMES * TOKENS)
        if index not in first_of_each(candidates.part.saliency, FRAMES).tolist()
    ]
    assert tokens.times.tolist() == [index // TOKENS for index in rest]
    assert tokens.places.equal(candidates.part.places[rest])
    assert tokens.budget == 3


@pytest.mark.parametrize("budget", [FRAMES, 31, FRAMES * TOKENS - 1])
@pytest.mark.parametrize("name", ["visionzip", "prumerge+"])
def test_merging_is_done_frame_by_frame(name: str, budget: int) -> None:
    candidates = clip(budget, name)
    (selection,) = choose.choose([candidates])
    assert selection.merged is not None
    assert len(selection.merged) == budget
    part = candidates.part
    step = Part(
        projected=part.projected[:TOKENS],
        features=part.features[:TOKENS],
        saliency=part.saliency[:TOKENS],
        keys=None if part.keys is None else part.keys[:TOKENS],
        places=part.places[:TOKENS],
    )
    first = replace(candidates, part=step, budget=-(-budget // FRAMES))
    (alone,) = choose.choose([first])
    expected = candidates.part.features[:TOKENS] if alone.merged is None else alone.merged
    assert selection.merged[: len(expected)].equal(expected)


def test_images_and_videos_in_one_step_are_selected_as_alone() -> None:
    clips = [clip(30, seed=1), clip(40, seed=2)]
    image = replace(clips[0], part=replace(clips[0].part, frames=1))
    together = choose.choose([clips[0], image, clips[1]])
    alone = [choose.choose([each])[0] for each in (clips[0], image, clips[1])]
    for one, other in zip(together, alone, strict=True):
        assert isinstance(one, Selection)
        assert one.indices is not None
        assert other.indices is not None
        assert one.indices.equal(other.indices)
    assert together[0].indices is not None
    assert together[1].indices is not None
    assert not together[0].indices.equal(together[1].indices)
