# SPDX-License-Identifier: Apache-2.0
"""Several images of several requests in one step: each gets its own selector's own answer."""

import dataclasses
from collections.abc import Mapping

import pytest
import torch

pytest.importorskip("vllm")

from flashvlm_vllm.failures import SELECTION_FAILURES
from flashvlm_vllm.models import pruning
from flashvlm_vllm.models.pruning import Candidates
from flashvlm_vllm.selection import Selection, Selector, VisualTokens, select_visual_tokens


def image(number: int, selector: str, budget: int) -> Candidates:
    draw = torch.Generator().manual_seed(number)
    return Candidates(
        selector=selector,
        identity=bytes([number] * 32),
        budget=budget,
        projected=torch.randn(25, 8, generator=draw),
        features=torch.randn(25, 6, generator=draw),
        saliency=torch.rand(25, generator=draw),
        text=torch.randn(3, 8, generator=draw),
        keys=None,
        places=torch.stack([torch.arange(25) // 5, torch.arange(25) % 5], dim=1),
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
    find = pruning.find_selector
    monkeypatch.setattr(
        pruning, "find_selector", lambda name: known[name] if name in known else find(name)
    )


def test_a_mixed_step(selectors: None) -> None:
    images = [
        image(1, "flashvlm", 9),
        image(2, "picky", 4),
        image(3, "flashvlm", 5),
        image(4, "picky", 3),
        image(5, "divprune", 7),
        image(6, "flashvlm", 99),
        image(7, "picky", 6),
    ]
    chosen = [each.indices for each in pruning._choose(images)]
    for number in (0, 2):
        each = images[number]
        alone = select_visual_tokens(
            each.projected, each.saliency, each.text, each.budget, each.features
        )
        assert torch.equal(chosen[number], alone)
    assert chosen[1].tolist() == [0, 1, 2, 3]
    assert len(chosen[4]) == 7
    assert chosen[5].tolist() == list(range(25))
    # The one that failed has tokens all the same, and is known to have failed; it alone.
    assert chosen[3].tolist() == [4, 12, 20]
    assert chosen[6].tolist() == [0, 1, 2, 3, 4, 5]
    failed = SELECTION_FAILURES.among([each.identity.hex() for each in images])
    assert list(failed) == [images[3].identity.hex()]
    assert "three is too few" in failed[images[3].identity.hex()]


def test_a_question_is_shown_only_to_selectors_that_read_it() -> None:
    each = image(1, "vispruner", 4)
    assert each.tokens(pruning.find_selector("vispruner")).text is None
    assert each.tokens(pruning.find_selector("flashvlm")).text is each.text
    other = dataclasses.replace(each, text=None)
    pair = [choice.indices for choice in pruning._choose([each, other])]
    assert torch.equal(pair[0], pair[1])


@pytest.mark.parametrize("field", ["indices", "merged"])
def test_what_is_remembered_holds_nothing_else(field: str) -> None:
    batch = torch.arange(60.0).view(20, 3)
    view = Selection(**{field: batch[:1]}).detached()
    (copy,) = [each for each in (view.indices, view.merged) if each is not None]
    assert torch.equal(copy, batch[:1])
    assert copy.untyped_storage().nbytes() == copy.nbytes
    assert (view.indices is None) == (field == "merged")
