# SPDX-License-Identifier: Apache-2.0
"""The public functions: guarantees for every input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashvlm_vllm.selection import (
    ABLATIONS,
    SelectionConfig,
    fused_scores,
    select_visual_tokens,
    select_visual_tokens_ragged,
)

from . import reference
from .conftest import assert_exact, make_image

IMPORTANT_ONLY = SelectionConfig(important_fraction=1.0)
CONFIGS = {
    "published": SelectionConfig(),
    "small_rounds": SelectionConfig(removed_per_round=3, important_fraction=0.25),
    **ABLATIONS,
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("budget", [1, 7, 24, 39])
def test_the_selection_equals_the_slow_reference(name: str, budget: int) -> None:
    image = make_image(60, seed=budget)
    for diversity in (None, image.diversity):
        kept = select_visual_tokens(
            image.features, image.saliency, image.text, budget, diversity, CONFIGS[name]
        )
        expected = reference.select(
            image.features.tolist(),
            image.saliency.tolist(),
            image.text.tolist(),
            budget,
            None if diversity is None else diversity.tolist(),
            CONFIGS[name],
        )
        assert kept.tolist() == expected


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_changes_the_result(name: str) -> None:
    image = make_image(200)
    published = select_visual_tokens(image.features, image.saliency, image.text, 40)
    ablated = select_visual_tokens(
        image.features, image.saliency, image.text, 40, config=ABLATIONS[name]
    )
    assert published.tolist() != ablated.tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 8, 17, 24, 41])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.75, 1.0])
def test_every_budget_is_met_exactly(count: int, fraction: float) -> None:
    image = make_image(count)
    config = SelectionConfig(important_fraction=fraction)
    for budget in range(1, count + 3):
        kept = select_visual_tokens(
            image.features, image.saliency, image.text, budget, image.diversity, config
        )
        assert_exact(kept, budget, count)


@pytest.mark.parametrize("removed_per_round", [1, 3, 8, 100])
def test_the_last_round_removes_no_more_than_needed(removed_per_round: int) -> None:
    image = make_image(30)
    config = SelectionConfig(removed_per_round=removed_per_round, important_fraction=0.0)
    for budget in range(1, 30):
        kept = select_visual_tokens(
            image.features, image.saliency, image.text, budget, config=config
        )
        assert_exact(kept, budget, 30)


def test_a_budget_of_all_tokens_or_more_keeps_all() -> None:
    image = make_image(9)
    for budget in (9, 10, 10_000):
        kept = select_visual_tokens(image.features, image.saliency, image.text, budget)
        assert kept.tolist() == list(range(9))


@pytest.mark.parametrize("name", CONFIGS)
def test_without_a_question_tokens_are_ranked_by_saliency(name: str) -> None:
    image = make_image(50)
    best = sorted(image.saliency.argsort(descending=True)[:12].tolist())
    assert torch.equal(
        fused_scores(image.features, image.saliency, None, CONFIGS[name]).argsort(),
        image.saliency.argsort(),
    )
    for text in (None, torch.empty(0, image.features.shape[1])):
        kept = select_visual_tokens(image.features, image.saliency, text, 12, config=IMPORTANT_ONLY)
        assert kept.tolist() == best


@pytest.mark.parametrize("budget", [1, 6, 13, 64])
def test_without_a_question_the_selection_equals_vispruner(budget: int) -> None:
    image = make_image(144)
    kept = select_visual_tokens(
        image.features, image.saliency, None, budget, diversity_features=image.diversity
    )
    ranking = image.saliency.argsort(descending=True).tolist()
    important = budget // 2
    rows = [reference.unit(row) for row in image.diversity.tolist()]
    diverse, _ = reference.algorithm_1(rows, ranking[important:], budget - important, 8)
    assert kept.tolist() == sorted(ranking[:important] + diverse)


def test_gates_that_cancel_select_the_same_tokens_as_no_gate() -> None:
    image = make_image(200)
    kept = {
        gate: select_visual_tokens(
            image.features,
            image.saliency,
            image.text,
            40,
            config=SelectionConfig(query_gate=gate),
        ).tolist()
        for gate in ("none", "normalized_last", "normalized_first", "scaled")
    }
    assert kept["none"] == kept["normalized_last"] == kept["normalized_first"]
    assert kept["none"] != kept["scaled"]


def test_the_diversity_features_affect_only_the_diversity_reserve() -> None:
    image = make_image(100)
    without = select_visual_tokens(image.features, image.saliency, image.text, 20)
    with_own = select_visual_tokens(image.features, image.saliency, image.text, 20, image.diversity)
    important = set(
        select_visual_tokens(
            image.features, image.saliency, image.text, 10, config=IMPORTANT_ONLY
        ).tolist()
    )
    assert important <= set(without.tolist()) & set(with_own.tolist())
    assert without.tolist() != with_own.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_inputs_of_any_dtype_are_selected_in_float32(dtype: torch.dtype) -> None:
    image = make_image(150)
    given = [tensor.to(dtype) for tensor in image]
    features, saliency, text, diversity = given
    kept = select_visual_tokens(features, saliency, text, 30, diversity)
    expected = select_visual_tokens(
        features.float(), saliency.float(), text.float(), 30, diversity.float()
    )
    assert torch.equal(kept, expected)


class TestTies:
    def test_equal_saliency_keeps_the_lower_index(self) -> None:
        saliency = torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0])
        kept = select_visual_tokens(torch.randn(5, 4), saliency, None, 2, config=IMPORTANT_ONLY)
        assert kept.tolist() == [1, 2]

    @pytest.mark.parametrize("saliency", [None, torch.zeros(6), torch.full((6,), 0.7)])
    def test_constant_or_missing_saliency_keeps_raster_order(self, saliency: Tensor | None) -> None:
        kept = select_visual_tokens(torch.randn(6, 4), saliency, None, 3, config=IMPORTANT_ONLY)
        assert kept.tolist() == [0, 1, 2]

    @pytest.mark.parametrize("features", [torch.zeros(50, 8), torch.ones(50, 8)])
    @pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 6, 7, 49])
    def test_identical_tokens_are_selected_in_list_order(
        self, features: Tensor, budget: int
    ) -> None:
        kept = select_visual_tokens(features, None, features[:3], budget)
        assert_exact(kept, budget, 50)
        # All similarities are equal, so other features with this property give the same result.
        diverse, _ = reference.algorithm_1(
            [[1.0]] * 50, range(budget // 2, 50), budget - budget // 2, 8
        )
        assert kept.tolist() == sorted([*range(budget // 2), *diverse])


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    budget=st.integers(1, 45),
    seed=st.integers(0, 10_000),
    broken=st.lists(
        st.tuples(
            st.sampled_from(["features", "saliency", "text", "diversity"]),
            st.integers(0, 10_000),
            st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 3e38, -3e38]),
        ),
        max_size=12,
    ),
    everything=st.booleans(),
    name=st.sampled_from(sorted(CONFIGS)),
)
def test_non_finite_values_do_not_change_the_count(
    count: int,
    budget: int,
    seed: int,
    broken: list[tuple[str, int, float]],
    everything: bool,
    name: str,
) -> None:
    image = make_image(count, seed)
    for field, place, value in broken:
        flat = getattr(image, field).view(-1)
        if everything:
            flat.fill_(value)
        else:
            flat[place % flat.numel()] = value
    scores = fused_scores(image.features, image.saliency, image.text, CONFIGS[name])
    assert torch.isfinite(scores).all()
    kept = select_visual_tokens(
        image.features, image.saliency, image.text, budget, image.diversity, CONFIGS[name]
    )
    assert_exact(kept, budget, count)


def test_a_token_with_nan_saliency_is_not_among_the_most_salient() -> None:
    image = make_image(50)
    best = int(image.saliency.argmax())
    ranking = image.saliency.argsort(descending=True).tolist()
    image.saliency[best] = math.nan
    kept = select_visual_tokens(image.features, image.saliency, None, 5, config=IMPORTANT_ONLY)
    assert kept.tolist() == sorted(ranking[1:6])


def test_inputs_are_not_modified() -> None:
    image = make_image(60)
    before = [tensor.clone() for tensor in image]
    select_visual_tokens(image.features, image.saliency, image.text, 20, image.diversity)
    assert all(torch.equal(old, new) for old, new in zip(before, image, strict=True))


def test_memory_layout_does_not_matter() -> None:
    image = make_image(60)
    kept = select_visual_tokens(
        image.features.T.contiguous().T,
        torch.stack([image.saliency, image.saliency], dim=1)[:, 0],
        image.text.T.contiguous().T,
        20,
        image.diversity.T.contiguous().T,
    )
    expected = select_visual_tokens(image.features, image.saliency, image.text, 20, image.diversity)
    assert torch.equal(kept, expected)


def test_no_tensor_is_saved_for_backward() -> None:
    features, saliency, text, diversity = (tensor.requires_grad_() for tensor in make_image(60))
    stored: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        stored.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda packed: packed):
        select_visual_tokens(features, saliency, text, 20, diversity)
    assert not stored


@pytest.mark.parametrize("budget", [1, 64, 575])
def test_no_value_is_read_back_from_the_device(budget: int) -> None:
    """Meta tensors have no values: reading one, even to decide on a shape, raises."""
    image = [tensor.to("meta") for tensor in make_image(576)]
    kept = select_visual_tokens(image[0], image[1], image[2], budget, image[3])
    assert kept.shape == (budget,) and kept.device.type == "meta"


class TestRagged:
    def test_each_image_is_selected_independently(self) -> None:
        images = [make_image(count, seed) for seed, count in enumerate((30, 1, 77, 30))]
        budgets = [7, 1, 20, 50]
        texts = [images[0].text, None, images[2].text[:0], images[3].text]
        saliency = [images[0].saliency, images[1].saliency, None, images[3].saliency]
        diversity = [None, images[1].diversity, images[2].diversity, None]
        together = select_visual_tokens_ragged(
            [image.features for image in images], saliency, texts, budgets, diversity
        )
        alone = [
            select_visual_tokens(
                images[i].features, saliency[i], texts[i], budgets[i], diversity[i]
            )
            for i in range(4)
        ]
        assert [kept.tolist() for kept in together] == [kept.tolist() for kept in alone]
        assert [len(kept) for kept in together] == [7, 1, 20, 30]

    def test_no_images_give_an_empty_list(self) -> None:
        assert select_visual_tokens_ragged([], [], [], []) == []

    def test_arguments_must_have_one_entry_per_image(self) -> None:
        features = [torch.randn(4, 3)]
        with pytest.raises(ValueError, match=r"image_features has 1, .*budgets has 2"):
            select_visual_tokens_ragged(features, [None], [None], [2, 2])

    def test_an_error_names_the_image(self) -> None:
        features = [torch.randn(4, 3), torch.randn(5, 3)]
        with pytest.raises(ValueError, match=r"^image 1: budget is 0; allowed: "):
            select_visual_tokens_ragged(features, [None, None], [None, None], [2, 0])
        with pytest.raises(TypeError, match=r"^image 0: budget is True; allowed: "):
            select_visual_tokens_ragged(features, [None, None], [None, None], [True, 2])


class TestRefusals:
    @pytest.mark.parametrize("budget", [True, 2.0, "2", None])
    def test_a_budget_that_is_not_an_int_is_refused(self, budget: object) -> None:
        with pytest.raises(TypeError, match=r"^budget is "):
            select_visual_tokens(torch.randn(4, 3), None, None, budget)  # type: ignore[arg-type]

    @pytest.mark.parametrize("budget", [0, -1])
    def test_a_budget_below_one_is_refused(self, budget: int) -> None:
        with pytest.raises(ValueError, match=f"^budget is {budget}; allowed: "):
            select_visual_tokens(torch.randn(4, 3), None, None, budget)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"image_features": torch.randn(4)}, r"image_features is \(4,\)"),
            ({"image_features": torch.randn(1, 4, 3)}, r"image_features is \(1, 4, 3\)"),
            ({"image_features": torch.randn(0, 3)}, r"image_features is \(0, 3\)"),
            ({"image_features": torch.randn(4, 0)}, r"image_features is \(4, 0\)"),
            ({"saliency": torch.randn(5)}, r"saliency is \(5,\); allowed: \(4,\)"),
            ({"saliency": torch.randn(4, 1)}, r"saliency is \(4, 1\)"),
            ({"text_embeds": torch.randn(3)}, r"text_embeds is \(3,\); allowed: \(L, 3\)"),
            ({"text_embeds": torch.randn(2, 4)}, r"text_embeds is \(2, 4\)"),
            ({"diversity_features": torch.randn(5, 3)}, r"diversity_features is \(5, 3\)"),
            ({"diversity_features": torch.randn(4)}, r"diversity_features is \(4,\)"),
            ({"diversity_features": torch.randn(4, 0)}, r"diversity_features is \(4, 0\)"),
            ({"saliency": torch.empty(4, device="meta")}, "saliency is on meta; allowed: cpu"),
        ],
    )
    def test_a_wrong_shape_or_device_is_refused(
        self, changed: dict[str, Tensor], message: str
    ) -> None:
        arguments: dict[str, Tensor | None] = {
            "image_features": torch.randn(4, 3),
            "saliency": None,
            "text_embeds": None,
            "diversity_features": None,
        }
        with pytest.raises(ValueError, match=f"^{message}"):
            select_visual_tokens(budget=2, **{**arguments, **changed})  # type: ignore[arg-type]

    def test_fused_scores_checks_its_arguments(self) -> None:
        with pytest.raises(ValueError, match=r"^saliency is \(5,\)"):
            fused_scores(torch.randn(4, 3), torch.randn(5), None)

    def test_a_dtype_that_is_not_floating_point_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"^saliency is torch\.int64"):
            select_visual_tokens(torch.randn(4, 3), torch.arange(4), None, 2)

    def test_a_budget_of_all_tokens_still_checks_the_arguments(self) -> None:
        with pytest.raises(ValueError, match=r"^saliency is "):
            select_visual_tokens(torch.randn(4, 3), torch.randn(5), None, 4)
