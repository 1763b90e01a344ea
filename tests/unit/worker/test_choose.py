# SPDX-License-Identifier: Apache-2.0
"""Several images of several requests in one step: each is selected by its own selector."""

import dataclasses
from collections.abc import Mapping

import pytest
import torch

pytest.importorskip("vllm")

from flashvlm_vllm.selection import Selection, Selector, VisualTokens, select_visual_tokens
from flashvlm_vllm.worker import choose
from flashvlm_vllm.worker.candidates import Candidates, Part
from flashvlm_vllm.worker.selector_failures import SELECTOR_FAILURES


def image(number: int, selector: str, budget: int) -> Candidates:
    draw = torch.Generator().manual_seed(number)
    part = Part(
        projected=torch.randn(25, 8, generator=draw),
        features=torch.randn(25, 6, generator=draw),
        saliency=torch.rand(25, generator=draw),
        keys=None,
        places=torch.stack([torch.arange(25) // 5, torch.arange(25) % 5], dim=1),
    )
    return Candidates(
        part,
        selector=selector,
        selection_key=bytes([number] * 32),
        budget=budget,
        text=torch.randn(3, 8, generator=draw),
    )


def picky(tokens: VisualTokens) -> torch.Tensor:
    if tokens.budget == 3:
        raise RuntimeError("three is too few")
    return torch.arange(tokens.budget)


@pytest.fixture(params=["one by one", "together"])
def selectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A selector that fails for some images, alone or in a batch, beside the built-in ones."""
    many = (
        (lambda images: [picky(each) for each in images]) if request.param == "together" else None
    )
    known: Mapping[str, Selector] = {"picky": Selector(picky, choose_many=many)}
    find = choose.find_selector
    monkeypatch.setattr(
        choose, "find_selector", lambda name: known[name] if name in known else find(name)
    )


def test_images_with_different_selectors_in_one_step(selectors: None) -> None:
    images = [
        image(1, "flashvlm", 9),
        image(2, "picky", 4),
        image(3, "flashvlm", 5),
        image(4, "picky", 3),
        image(5, "divprune", 7),
        image(6, "flashvlm", 99),
        image(7, "picky", 6),
    ]
    chosen = [each.indices for each in choose.choose(images)]
    for number in (0, 2):
        each = images[number]
        alone = select_visual_tokens(
            each.part.projected, each.part.saliency, each.text, each.budget, each.part.features
        )
        assert torch.equal(chosen[number], alone)
    assert chosen[1].tolist() == [0, 1, 2, 3]
    assert len(chosen[4]) == 7
    assert chosen[5].tolist() == list(range(25))
    # The image whose selector failed gets stand-in tokens and is the only one recorded as failed.
    assert chosen[3].tolist() == [4, 12, 20]
    assert chosen[6].tolist() == [0, 1, 2, 3, 4, 5]
    failed = SELECTOR_FAILURES.among([each.selection_key.hex() for each in images])
    assert list(failed) == [images[3].selection_key.hex()]
    assert "three is too few" in failed[images[3].selection_key.hex()]


def test_the_question_is_passed_only_to_selectors_that_use_it() -> None:
    each = image(1, "vispruner", 4)
    assert each.tokens(choose.find_selector("vispruner")).text is None
    assert each.tokens(choose.find_selector("flashvlm")).text is each.text
    other = dataclasses.replace(each, text=None)
    pair = [choice.indices for choice in choose.choose([each, other])]
    assert torch.equal(pair[0], pair[1])


@pytest.mark.parametrize("field", ["indices", "merged"])
def test_a_cached_selection_does_not_hold_the_tensor_it_was_sliced_from(field: str) -> None:
    batch = torch.arange(60.0).view(20, 3)
    view = Selection(**{field: batch[:1]}).detached()
    (copy,) = [each for each in (view.indices, view.merged) if each is not None]
    assert torch.equal(copy, batch[:1])
    assert copy.untyped_storage().nbytes() == copy.nbytes
    assert (view.indices is None) == (field == "merged")
