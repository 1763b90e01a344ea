# SPDX-License-Identifier: Apache-2.0
"""The contract of selectors, the registry, and selectors of other packages."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashvlm_vllm.request.selector_name import parse_selector
from flashvlm_vllm.selection import (
    LanguageAttention,
    Merged,
    Selector,
    SelectorError,
    VisualTokens,
    run_selector,
    run_selector_many,
    select_visual_tokens,
    stand_in,
)
from flashvlm_vllm.selection.registry import BUILT_IN, LONGEST_NAME, find_selector, selectors


def tokens(budget: int, count: int = 40, seed: int = 0) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return VisualTokens(
        budget=budget,
        projected=draw(count, 12),
        features=draw(count, 8),
        saliency=draw(count).softmax(0),
        text=draw(3, 12),
        keys=draw(count, 2, 4),
        places=torch.stack([torch.arange(count) // 7, torch.arange(count) % 7], dim=1),
        seed=seed,
        attention=LanguageAttention(draw(5, count).sigmoid(), draw(2, 5, count).sigmoid(), 3),
    )


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("budget", [1, 2, 3, 7, 8, 9, 20, 33, 39])
@pytest.mark.parametrize("count", [40, 41])
def test_every_selector_keeps_exactly_the_budget(name: str, budget: int, count: int) -> None:
    given = tokens(budget, count)
    chosen = run_selector(name, BUILT_IN[name], given, trusted=False)
    if chosen.indices is not None:
        assert chosen.indices.dtype == torch.int64
        assert chosen.indices.tolist() == sorted(set(chosen.indices.tolist()))
        assert len(chosen.indices) == budget
    else:
        assert chosen.merged is not None
        assert chosen.merged.shape == (budget, 8)
        spots = chosen.spots.tolist()
        assert len(set(spots)) == budget
        assert 0 <= min(spots) <= max(spots) < count


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_selector_declares_correctly_whether_it_uses_the_question(name: str) -> None:
    selector = BUILT_IN[name]
    given = tokens(16)
    assert given.text is not None and given.attention is not None
    seen = replace(given.attention, mean=1 - given.attention.mean, read=1 - given.attention.read)
    other = replace(given, text=-given.text, attention=seen)
    first, second = (run_selector(name, selector, each, trusted=True) for each in (given, other))
    if selector.merges:
        assert first.merged is not None and second.merged is not None
        assert torch.equal(first.merged, second.merged)
        assert not selector.uses_question
    else:
        assert first.indices is not None and second.indices is not None
        assert torch.equal(first.indices, second.indices) is not selector.uses_question


def test_the_default_selector_is_the_published_selection() -> None:
    given = tokens(16)
    expected = select_visual_tokens(given.projected, given.saliency, given.text, 16, given.features)
    chosen = run_selector("flashvlm", find_selector("flashvlm"), given, trusted=False)
    assert chosen.indices is not None
    assert torch.equal(chosen.indices, expected)


def test_the_runner_sorts_the_indices_of_a_selector() -> None:
    backwards = Selector(lambda given: torch.arange(given.budget).flip(0))
    chosen = run_selector("backwards", backwards, tokens(5), trusted=False)
    assert chosen.indices is not None
    assert chosen.indices.tolist() == [0, 1, 2, 3, 4]


def test_merged_features_keep_their_order_and_get_the_tower_dtype() -> None:
    given = tokens(5)
    last_first = Selector(lambda each: each.features.flip(0)[:5].double(), merges=True)
    chosen = run_selector("last_first", last_first, given, trusted=False)
    assert chosen.merged is not None
    assert chosen.merged.dtype == torch.float32
    assert torch.equal(chosen.merged, given.features.flip(0)[:5])
    # Without positions from the selector, tokens are spaced evenly.
    assert chosen.spots.tolist() == [4, 12, 20, 28, 36]


def test_merged_tokens_are_placed_where_their_selector_says() -> None:
    given = tokens(3)
    anchors = torch.tensor([30, 2, 7])
    selector = Selector(lambda each: Merged(each.features[anchors], anchors), merges=True)
    chosen = run_selector("merging", selector, given, trusted=False)
    assert torch.equal(chosen.spots, anchors)
    for wrong in (torch.tensor([1, 1, 2]), torch.tensor([0, 1, 40]), torch.arange(4), "012"):

        def choose(each: VisualTokens, wrong: Any = wrong) -> Any:
            return each.features[:3], wrong

        with pytest.raises(SelectorError, match="merging returned"):
            run_selector("merging", Selector(choose, merges=True), given, trusted=False)


@pytest.mark.parametrize("budget", [1, 2, 5, 12, 39])
def test_unmerged_tokens_of_merging_selectors_keep_their_own_place(budget: int) -> None:
    given = replace(tokens(budget), keys=torch.zeros(40, 2, 4))
    chosen = run_selector("visionzip", BUILT_IN["visionzip"], given, trusted=True)
    assert chosen.merged is not None
    dominant = given.saliency.argsort(descending=True)[: budget - (10 * budget + 32) // 64]
    rows = chosen.merged[: len(dominant)]
    assert torch.equal(rows, given.features[chosen.spots[: len(dominant)]])
    assert set(chosen.spots[: len(dominant)].tolist()) == set(dominant.tolist())
    # Without attention beside them, PruMerge+'s tokens are the centres of their clusters.
    quiet = replace(given, saliency=given.saliency * 1e-9)
    clustered = run_selector("prumerge+", BUILT_IN["prumerge+"], quiet, trusted=True)
    assert clustered.merged is not None
    near = budget - budget % 2
    assert torch.allclose(
        clustered.merged[:near], given.features[clustered.spots[:near]], atol=1e-5
    )


WRONG: dict[str, Callable[[VisualTokens], Any]] = {
    "few": lambda given: torch.arange(given.budget - 1),
    "many": lambda given: torch.arange(given.budget + 1),
    "floats": lambda given: torch.arange(given.budget).float(),
    "int32": lambda given: torch.arange(given.budget, dtype=torch.int32),
    "mask": lambda given: torch.ones(40, dtype=torch.bool),
    "column": lambda given: torch.arange(given.budget)[:, None],
    "repeated": lambda given: torch.zeros(given.budget, dtype=torch.int64),
    "negative": lambda given: torch.arange(given.budget) - 1,
    "beyond": lambda given: torch.arange(given.budget) + 40,
    "list": lambda given: list(range(given.budget)),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_invalid_result_is_refused_with_the_selector_name(name: str) -> None:
    with pytest.raises(SelectorError, match=f"^{name} returned"):
        run_selector(name, Selector(WRONG[name]), tokens(5), trusted=False)


@pytest.mark.parametrize("rows", [4, 6])
def test_a_wrong_number_of_merged_features_is_refused(rows: int) -> None:
    wrong = Selector(lambda given: given.features[:rows], merges=True)
    with pytest.raises(SelectorError, match=r"allowed: a floating-point tensor \(5, 8\)"):
        run_selector("wrong", wrong, tokens(5), trusted=True)


@pytest.mark.parametrize("merges", [False, True])
def test_a_stand_in_has_the_form_of_the_selection_it_replaces(merges: bool) -> None:
    given = tokens(7)
    chosen = stand_in(Selector(lambda each: each.features, merges=merges), given)
    wanted, other = (chosen.merged, chosen.indices) if merges else (chosen.indices, chosen.merged)
    assert wanted is not None and len(wanted) == 7
    assert other is None


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    info = tmp_path / "strange-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strange\nVersion: 1.0\n")
    (tmp_path / "strange.py").write_text(
        "from flashvlm_vllm.selection import Selector\n"
        "GOOD = Selector(lambda tokens: tokens.saliency.topk(tokens.budget).indices)\n"
        "BAD = len\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    selectors.cache_clear()
    yield info / "entry_points.txt"
    selectors.cache_clear()


def test_another_package_adds_a_selector(package: Path) -> None:
    package.write_text("[flashvlm.selectors]\nbrightest = strange:GOOD\n")
    assert list(selectors()) == [*BUILT_IN, "brightest"]
    given = tokens(6)
    chosen = run_selector("brightest", find_selector("brightest"), given, trusted=False)
    assert chosen.indices is not None
    assert set(chosen.indices.tolist()) == set(given.saliency.topk(6).indices.tolist())


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ("flashvlm = strange:GOOD", ValueError, "two selectors are named 'flashvlm'"),
        ("other = strange:BAD", TypeError, r"'other' \(strange:BAD\) is builtin_function"),
        (f"{'x' * (LONGEST_NAME + 1)} = strange:GOOD", ValueError, "more than 64 bytes"),
    ],
)
def test_an_invalid_selector_entry_point_is_refused_by_name(
    package: Path, entry: str, error: type[Exception], message: str
) -> None:
    package.write_text(f"[flashvlm.selectors]\n{entry}\n")
    with pytest.raises(error, match=message):
        selectors()


def test_an_unknown_name_is_refused_with_the_known_names() -> None:
    with pytest.raises(
        ValueError, match=r"unknown selector 'flashvml'; known: flashvlm, flashvlm-2, llm-"
    ):
        find_selector("flashvml")
    with pytest.raises(ValueError, match=r"unknown selector 'x{64}\.\.\.'; known: flashvlm"):
        find_selector("x" * 10**6)


@pytest.mark.parametrize("value", ["", "  ", 5, True, ["flashvlm"]])
def test_an_invalid_name_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="visual selector"):
        parse_selector(value)


def test_a_name_may_be_none_or_surrounded_by_blanks() -> None:
    assert parse_selector(None) is None
    assert parse_selector(" vispruner ") == "vispruner"


class TestMany:
    @pytest.mark.parametrize("name", BUILT_IN)
    def test_images_in_a_batch_are_selected_as_alone(self, name: str) -> None:
        given = [tokens(budget, count, budget) for budget, count in ((7, 40), (1, 9), (30, 41))]
        together = run_selector_many(name, BUILT_IN[name], given, trusted=False)
        for each, chosen in zip(given, together, strict=True):
            single = run_selector(name, BUILT_IN[name], each, trusted=False)
            for field in ("indices", "merged"):
                one, other = getattr(chosen, field), getattr(single, field)
                assert (one is None) == (other is None)
                assert one is None or torch.equal(one, other)

    def test_choose_many_is_used_if_the_selector_has_it(self) -> None:
        def never(_: VisualTokens) -> torch.Tensor:
            raise AssertionError

        backwards = Selector(
            never, choose_many=lambda given: [torch.arange(each.budget).flip(0) for each in given]
        )
        chosen = run_selector_many("backwards", backwards, [tokens(3), tokens(2)], trusted=False)
        assert [each.indices.tolist() for each in chosen if each.indices is not None] == [
            [0, 1, 2],
            [0, 1],
        ]

    @pytest.mark.parametrize("name", WRONG)
    def test_each_result_of_choose_many_is_checked(self, name: str) -> None:
        def choose(given: Sequence[VisualTokens]) -> list[Any]:
            return [torch.arange(given[0].budget), WRONG[name](given[1])]

        wrong = Selector(WRONG[name], choose_many=choose)
        with pytest.raises(SelectorError, match=f"^{name} returned"):
            run_selector_many(name, wrong, [tokens(5), tokens(5)], trusted=False)

    @pytest.mark.parametrize("answer", [None, [], [torch.arange(5)], torch.zeros(2, 5)])
    def test_choose_many_must_return_one_result_per_image(self, answer: Any) -> None:
        wrong = Selector(WRONG["list"], choose_many=lambda given: answer)
        with pytest.raises(SelectorError, match=r"^wrong returned .* for 2 images; allowed: "):
            run_selector_many("wrong", wrong, [tokens(5), tokens(5)], trusted=True)

    def test_an_exception_of_choose_many_is_reported(self) -> None:
        def choose(given: Sequence[VisualTokens]) -> list[torch.Tensor]:
            raise KeyError("away")

        wrong = Selector(WRONG["list"], choose_many=choose)
        with pytest.raises(SelectorError, match=r"^wrong raised KeyError: 'away'"):
            run_selector_many("wrong", wrong, [tokens(5)], trusted=True)

    def test_no_images_give_an_empty_list(self) -> None:
        assert run_selector_many("flashvlm", BUILT_IN["flashvlm"], [], trusted=True) == []
