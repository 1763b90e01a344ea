# SPDX-License-Identifier: Apache-2.0
"""The baselines that choose indices, against slow references and hand-computed cases."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashvlm_vllm.selection.baselines as baselines
from flashvlm_vllm.selection import SelectionConfig, select_visual_tokens
from flashvlm_vllm.selection.baselines import (
    cdpruner,
    divprune,
    random_tokens,
    uniform,
    vispruner,
)
from flashvlm_vllm.selection.determinant import largest_determinant
from flashvlm_vllm.selection.partition import cosine_gram

from . import reference
from .conftest import Image, assert_exact, make_image

Selector = Callable[[Image, int], Tensor]
SELECTORS: dict[str, Selector] = {
    "vispruner": lambda image, budget: vispruner(image.saliency, image.diversity, budget),
    "fastervlm": lambda image, budget: vispruner(image.saliency, image.diversity, budget, 1.0),
    "cdpruner": lambda image, budget: cdpruner(image.features, image.text, budget),
    "cdpruner_negated": lambda image, budget: cdpruner(
        image.diversity, image.text, budget, relevance_features=image.features, negated=True
    ),
    "cdpruner_without_text": lambda image, budget: cdpruner(image.features, None, budget),
    "divprune": lambda image, budget: divprune(image.features, budget),
    "uniform": lambda image, budget: uniform(len(image.features), budget),
    "random_tokens": lambda image, budget: random_tokens(len(image.features), budget, 7),
}
LOOKING = [name for name in SELECTORS if name not in ("uniform", "random_tokens")]


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("count", [1, 2, 3, 9, 24, 41])
def test_every_budget_is_met_exactly(name: str, count: int) -> None:
    """The features have 24 dimensions: 41 of them are linearly dependent."""
    image = make_image(count)
    for budget in range(1, count + 3):
        assert_exact(SELECTORS[name](image, budget), budget, count)


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.parametrize("value", [0.0, 1.0, -2.0, math.nan, math.inf, 3e38])
def test_identical_tokens_still_give_the_exact_count(name: str, value: float) -> None:
    alike = Image(*(torch.full_like(tensor, value) for tensor in make_image(19)))
    for budget in (1, 2, 9, 18):
        assert_exact(SELECTORS[name](alike, budget), budget, 19)


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 3e38])
@pytest.mark.parametrize("field", range(4))
def test_a_non_finite_row_does_not_change_the_count(name: str, value: float, field: int) -> None:
    image = make_image(19)
    image[field][4] = value
    for budget in (1, 2, 9, 18):
        assert_exact(SELECTORS[name](image, budget), budget, 19)


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_inputs_of_any_dtype_are_selected_in_float32(name: str, dtype: torch.dtype) -> None:
    image = Image(*(tensor.to(dtype) for tensor in make_image(40)))
    single = Image(*(tensor.float() for tensor in image))
    assert torch.equal(SELECTORS[name](image, 13), SELECTORS[name](single, 13))


@pytest.mark.parametrize("name", LOOKING)
def test_no_value_is_read_back_from_the_device(name: str) -> None:
    """Meta tensors have no values: reading one, even to decide on a shape, raises."""
    image = Image(*(tensor.to("meta") for tensor in make_image(40)))
    kept = SELECTORS[name](image, 13)
    assert kept.shape == (13,) and kept.device.type == "meta"


@pytest.mark.parametrize("name", LOOKING)
def test_inputs_are_not_modified(name: str) -> None:
    image = make_image(30)
    before = [tensor.clone() for tensor in image]
    SELECTORS[name](image, 11)
    assert all(torch.equal(old, new) for old, new in zip(before, image, strict=True))


class TestVisPruner:
    @pytest.mark.parametrize("count", [40, 57])
    def test_vispruner_equals_flashvlm_without_a_question(self, count: int) -> None:
        image = make_image(count)
        config = SelectionConfig(important_fraction=0.5)
        for budget in range(1, count + 1):
            expected = select_visual_tokens(
                image.features, image.saliency, None, budget, image.diversity, config
            )
            assert torch.equal(vispruner(image.saliency, image.diversity, budget), expected)

    @pytest.mark.parametrize("fraction", [0.0, 0.5, 0.75, 1.0])
    def test_the_selection_equals_the_slow_reference(self, fraction: float) -> None:
        image = make_image(50)
        ranking = image.saliency.argsort(descending=True).tolist()
        important = int(fraction * 20)
        rows = [reference.unit(row) for row in image.diversity.tolist()]
        expected = ranking[:important]
        if important < 20:
            expected += reference.algorithm_1(rows, ranking[important:], 20 - important, 8)[0]
        kept = vispruner(image.saliency, image.diversity, 20, fraction)
        assert kept.tolist() == sorted(expected)

    @pytest.mark.parametrize(
        ("changed", "error", "message"),
        [
            ({"budget": 0}, ValueError, "budget is 0; allowed: an int of at least 1"),
            ({"budget": 2.0}, TypeError, r"budget is 2\.0; allowed: "),
            ({"features": torch.ones(4)}, ValueError, r"features is \(4,\); allowed: \(N, C\)"),
            ({"saliency": torch.ones(5)}, ValueError, r"saliency is \(5,\); allowed: \(4,\)$"),
            ({"saliency": torch.arange(4)}, TypeError, r"saliency is torch\.int64; allowed: "),
            (
                {"saliency": torch.ones(4, device="meta")},
                ValueError,
                "saliency is on meta; allowed: cpu",
            ),
            (
                {"important_fraction": 1.5},
                ValueError,
                r"SelectionConfig\.important_fraction is 1\.5; allowed: ",
            ),
        ],
    )
    def test_invalid_arguments_are_refused(
        self, changed: dict[str, object], error: type[Exception], message: str
    ) -> None:
        arguments: dict[str, Any] = {
            "saliency": torch.ones(4),
            "features": torch.ones(4, 3),
            "budget": 9,
        }
        with pytest.raises(error, match=f"^{message}"):
            vispruner(**{**arguments, **changed})


class TestCDPruner:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("negated", [False, True])
    def test_each_step_maximises_the_determinant(self, seed: int, negated: bool) -> None:
        image = make_image(12, seed)
        features, text = image.features.double(), image.text.double()
        unit = features / features.norm(dim=1, keepdim=True)
        words = text / text.norm(dim=1, keepdim=True)
        cosine = (unit @ words.T).mean(dim=1) * (-1 if negated else 1)
        quality = (cosine - cosine.min()) / (cosine.max() - cosine.min() + 1e-6) + 1e-6
        kernel = quality[:, None] * (unit @ unit.T) * quality
        kept: list[int] = []
        for budget in range(1, 12):
            gains = {
                j: torch.linalg.det(kernel[[*kept, j]][:, [*kept, j]]).item()
                for j in range(12)
                if j not in kept
            }
            kept.append(max(gains, key=lambda j: gains[j]))
            selected = cdpruner(image.features, image.text, budget, negated=negated)
            assert selected.tolist() == sorted(kept)

    def test_tokens_similar_to_the_question_are_relevant_unless_negated(self) -> None:
        features = torch.eye(4)
        question = torch.tensor([[0.1, 0.9, 0.2, 0.3]])
        assert cdpruner(features, question, 1).tolist() == [1]
        assert cdpruner(features, question, 2).tolist() == [1, 3]
        assert cdpruner(features, question, 1, negated=True).tolist() == [0]

    def test_relevance_can_use_other_features(self) -> None:
        features, elsewhere = torch.eye(4), torch.eye(4)[:, [2, 3, 0, 1]]
        question = torch.tensor([[0.1, 0.9, 0.2, 0.3, 0.0]])
        elsewhere = torch.cat([elsewhere, torch.zeros(4, 1)], dim=1)
        assert cdpruner(features, question, 1, relevance_features=elsewhere).tolist() == [3]

    def test_a_duplicate_token_is_not_kept_even_if_relevant(self) -> None:
        features = torch.eye(5)
        features[2] = features[1]
        question = torch.tensor([[0.1, 0.9, 0.0, 0.3, 0.2]])
        assert cdpruner(features, question, 3).tolist() == [1, 3, 4]

    def test_relevance_decides_once_all_directions_are_kept(self) -> None:
        # Six tokens in a plane: after two of them the others add no volume.
        angles = torch.tensor([0.0, 0.3, 0.6, 0.9, 1.2, 1.5])
        features = torch.stack([angles.cos(), angles.sin()], dim=1)
        question = torch.tensor([[1.0, 0.0]])
        pair = cdpruner(features, question, 2).tolist()
        others = [index for index in range(6) if index not in pair]
        for more in range(1, 4):
            assert cdpruner(features, question, 2 + more).tolist() == sorted(pair + others[:more])

    def test_rounding_errors_do_not_grow_after_the_last_direction(self) -> None:
        """236 steps after the last direction; without a guard they give NaN and repeated tokens."""
        random = torch.Generator().manual_seed(64)
        similarity = cosine_gram(torch.randn(300, 64, generator=random))
        weight = torch.rand(300, generator=random) + 0.1
        kept = largest_determinant(similarity, weight, 300).tolist()
        assert sorted(kept) == list(range(300))

    def test_without_a_question_or_with_equal_relevance_only_diversity_counts(self) -> None:
        image = make_image(30)
        alone = cdpruner(image.features, None, 9)
        assert torch.equal(cdpruner(image.features, image.text[:0], 9), alone)
        constant = torch.ones(30, image.text.shape[1])
        same = cdpruner(image.features, image.text, 9, relevance_features=constant)
        assert torch.equal(same, alone)
        assert not torch.equal(cdpruner(image.features, image.text, 9), alone)

    def test_equal_gains_keep_the_lower_index(self) -> None:
        assert cdpruner(torch.eye(6), None, 3).tolist() == [0, 1, 2]
        assert cdpruner(torch.ones(6, 4), torch.ones(2, 4), 3).tolist() == [0, 1, 2]

    @pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
    @pytest.mark.parametrize("negated", [False, True])
    def test_a_non_finite_or_zero_token_is_kept_last(self, value: float, negated: bool) -> None:
        image = make_image(20)
        image.features[6] = value
        kept = cdpruner(image.features, image.text, 19, negated=negated).tolist()
        assert kept == [index for index in range(20) if index != 6]

    def test_a_non_finite_word_is_ignored(self) -> None:
        image = make_image(20)
        broken = torch.cat([image.text, torch.full_like(image.text[:1], math.nan)])
        expected = cdpruner(image.features, image.text, 8)
        assert torch.equal(cdpruner(image.features, broken, 8), expected)

    @pytest.mark.parametrize(
        ("changed", "error", "message"),
        [
            ({"budget": True}, TypeError, "budget is True; allowed: an int of at least 1"),
            ({"budget": -3}, ValueError, "budget is -3; allowed: "),
            ({"negated": 1}, TypeError, "negated is 1; allowed: True or False"),
            (
                {"image_features": torch.ones(0, 3)},
                ValueError,
                r"image_features is \(0, 3\); allowed: \(N, D\) with N, D >= 1$",
            ),
            (
                {"text_embeds": torch.ones(2, 5)},
                ValueError,
                r"text_embeds is \(2, 5\); allowed: \(L, 3\) with L >= 0$",
            ),
            ({"text_embeds": torch.ones(0, 5)}, ValueError, r"text_embeds is \(0, 5\)"),
            (
                {"relevance_features": torch.ones(5, 3)},
                ValueError,
                r"relevance_features is \(5, 3\); allowed: \(4, E\)",
            ),
            (
                {"relevance_features": torch.ones(4, 6)},
                ValueError,
                r"text_embeds is \(2, 3\); allowed: \(L, 6\)",
            ),
        ],
    )
    def test_invalid_arguments_are_refused(
        self, changed: dict[str, object], error: type[Exception], message: str
    ) -> None:
        arguments: dict[str, Any] = {
            "image_features": torch.ones(4, 3),
            "text_embeds": torch.ones(2, 3),
            "budget": 9,
        }
        with pytest.raises(error, match=f"^{message}"):
            cdpruner(**{**arguments, **changed})


class TestDivPrune:
    @pytest.mark.parametrize("seed", range(4))
    def test_result_equals_the_naive_loop(self, seed: int) -> None:
        image = make_image(15, seed)
        rows = [reference.unit(row) for row in image.features.tolist()]

        def distance(left: int, right: int) -> float:
            return 1 - reference.dot(rows[left], rows[right])

        kept: list[int] = []
        for budget in range(1, 15):
            others = {
                i: min(distance(i, j) for j in (kept or range(15)) if j != i)
                for i in range(15)
                if i not in kept
            }
            # The two tokens of the best pair are each other's neighbour: equal up to the last bit.
            largest = max(others.values())
            kept.append(next(i for i, nearest in others.items() if nearest > largest - 1e-9))
            assert divprune(image.features, budget).tolist() == sorted(kept)

    def test_hand_computed_example(self) -> None:
        degrees = torch.tensor([0.0, 10.0, 20.0, 90.0, 100.0, 240.0])
        angles = degrees.deg2rad()
        features = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.arange(1, 7)[:, None]
        # 240 has the farthest neighbour (0 or 100 degrees); then 90, since 0, 10 and 20 are nearer
        # to 240 in the other direction: 150 against 120, 130 and 140.
        assert divprune(features, 1).tolist() == [5]
        assert divprune(features, 2).tolist() == [3, 5]
        assert divprune(features, 3).tolist() == [0, 3, 5]

    def test_duplicates_are_kept_last_and_in_order(self) -> None:
        features = torch.nn.functional.normalize(make_image(8).features).repeat(3, 1)
        assert sorted(i % 8 for i in divprune(features, 8).tolist()) == list(range(8))
        assert divprune(features, 8).tolist() == list(range(8))
        assert divprune(features, 12).tolist() == list(range(12))

    @pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 3e38])
    def test_a_non_finite_or_zero_token_is_kept_last_and_ignored_as_a_neighbour(
        self, value: float
    ) -> None:
        image = make_image(20)
        intact = torch.cat([image.features[:6], image.features[7:]])
        image.features[6] = value
        for budget in (1, 2, 7, 18):
            expected = [i + (i >= 6) for i in divprune(intact, budget).tolist()]
            assert divprune(image.features, budget).tolist() == expected
        assert 6 not in divprune(image.features, 19).tolist()

    def test_a_non_finite_token_does_not_count_as_orthogonal(self) -> None:
        angles = torch.tensor([0.0, 100.0, 240.0, math.nan]).deg2rad()
        features = torch.stack([angles.cos(), angles.sin()], dim=1)
        assert divprune(features, 1).tolist() == [2]

    @pytest.mark.parametrize(
        ("features", "budget", "error", "message"),
        [
            (torch.ones(4, 3), None, TypeError, "budget is None; allowed: "),
            (torch.ones(4, 3), 0, ValueError, "budget is 0; allowed: "),
            (torch.ones(4, 0), 2, ValueError, r"image_features is \(4, 0\); allowed: \(N, D\)"),
            (torch.ones(4, 3).long(), 2, TypeError, r"image_features is torch\.int64; allowed: "),
        ],
    )
    def test_invalid_arguments_are_refused(
        self, features: Tensor, budget: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=f"^{message}"):
            divprune(features, budget)


class TestUniform:
    @pytest.mark.parametrize(
        ("total", "budget", "expected"),
        [(9, 1, [4]), (9, 3, [1, 4, 7]), (10, 4, [1, 3, 6, 8]), (3, 3, [0, 1, 2])],
    )
    def test_the_middle_of_each_interval_is_kept(
        self, total: int, budget: int, expected: list[int]
    ) -> None:
        assert uniform(total, budget).tolist() == expected

    def test_gaps_differ_by_at_most_one_and_both_margins_match(self) -> None:
        for budget in range(2, 97):
            kept = uniform(97, budget)
            gaps = kept.diff()
            assert gaps.max() - gaps.min() <= 1
            assert abs(int(kept[0]) - (96 - int(kept[-1]))) <= 1

    @pytest.mark.parametrize(
        ("total", "budget", "error", "message"),
        [
            (0, 2, ValueError, "total is 0; allowed: an int of at least 1"),
            (4.0, 2, TypeError, r"total is 4\.0; allowed: "),
            (4, 0, ValueError, "budget is 0; allowed: "),
        ],
    )
    def test_invalid_arguments_are_refused(
        self, total: Any, budget: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=f"^{message}"):
            uniform(total, budget)


class TestRandomTokens:
    def test_only_the_seed_determines_the_tokens(self) -> None:
        torch.manual_seed(1)
        first = random_tokens(100, 20, 5)
        torch.manual_seed(2)
        before = torch.get_rng_state()
        with torch.device("meta"):
            again = random_tokens(100, 20, 5)
        assert again.tolist() == first.tolist()
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.equal(random_tokens(100, 20, 6), first)

    def test_a_larger_budget_keeps_the_tokens_of_a_smaller_one(self) -> None:
        assert set(random_tokens(100, 20, 5).tolist()) < set(random_tokens(100, 21, 5).tolist())

    def test_every_token_is_drawn_about_equally_often(self) -> None:
        counts = torch.zeros(10)
        for seed in range(400):
            counts[random_tokens(10, 3, seed)] += 1
        # Mean 120, standard deviation 9.
        assert counts.min() > 70 and counts.max() < 170

    @pytest.mark.parametrize(
        ("total", "budget", "seed", "error", "message"),
        [
            (True, 2, 0, TypeError, "total is True; allowed: "),
            (4, -1, 0, ValueError, "budget is -1; allowed: "),
            (4, 2, -1, ValueError, r"seed is -1; allowed: an int from 0 to 2\^63 - 1"),
            (4, 2, 2**63, ValueError, f"seed is {2**63}; allowed: "),
            (4, 2, "0", TypeError, "seed is '0'; allowed: "),
        ],
    )
    def test_invalid_arguments_are_refused(
        self, total: Any, budget: Any, seed: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=f"^{message}"):
            random_tokens(total, budget, seed)


def test_baselines_import_only_torch_and_the_selection_package() -> None:
    named = set()
    for source in Path(baselines.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module is not None
                named.add(node.module)
    ours = {name for name in named if name.startswith("flashvlm_vllm.selection.")}
    assert ours and named - ours == {"__future__", "math", "torch", "typing"}
