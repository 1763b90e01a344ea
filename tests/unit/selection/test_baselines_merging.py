# SPDX-License-Identifier: Apache-2.0
"""The baselines that merge tokens: counts, order and sums, by hand and against plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashvlm_vllm.selection.baselines import prumerge_plus, visionzip
from flashvlm_vllm.selection.baselines.prumerge import salient_and_spaced
from flashvlm_vllm.selection.baselines.visionzip import contextual_count

from .conftest import make_image

Merging = Callable[[Tensor, Tensor, Tensor, int], Tensor]
MERGING: dict[str, Merging] = {"visionzip": visionzip, "prumerge_plus": prumerge_plus}


def make_tower(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    image = make_image(count, seed)
    return image.features, image.saliency, image.diversity


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("count", [1, 2, 3, 9, 40, 67])
def test_every_budget_is_met_exactly(name: str, count: int) -> None:
    tower = make_tower(count)
    for budget in range(1, count + 3):
        merged = MERGING[name](*tower, budget)
        assert merged.shape == (min(budget, count), 24)
        assert torch.isfinite(merged).all()


@pytest.mark.parametrize("name", MERGING)
def test_a_budget_of_all_tokens_returns_the_features_unchanged(name: str) -> None:
    tower = make_tower(9)
    for budget in (9, 10, 10_000):
        assert torch.equal(MERGING[name](*tower, budget), tower[0])


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf])
@pytest.mark.parametrize("field", range(3))
def test_a_non_finite_row_does_not_affect_other_rows(name: str, value: float, field: int) -> None:
    tower = make_tower(40)
    tower[1][13] = 0.0  # neither dominant nor a target
    tower[field][13] = value
    for budget in (1, 2, 9, 32, 39):
        merged = MERGING[name](*tower, budget)
        assert merged.shape == (budget, 24)
        if budget < 39:  # at 39 VisionZip keeps the row itself
            assert torch.isfinite(merged).all()


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("value", [0.0, 1.0, math.nan])
def test_identical_tokens_still_give_the_exact_count(name: str, value: float) -> None:
    tower = [torch.full_like(tensor, value) for tensor in make_tower(40)]
    for budget in range(1, 40):
        assert MERGING[name](*tower, budget).shape == (budget, 24)


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_float32_and_the_result_has_the_tower_dtype(name: str, dtype: torch.dtype) -> None:
    tower = [tensor.to(dtype) for tensor in make_tower(40)]
    merged = MERGING[name](*tower, 13)
    single = MERGING[name](*(tensor.float() for tensor in tower), 13)
    assert merged.dtype == dtype
    assert torch.equal(merged, single.to(dtype))


@pytest.mark.parametrize("name", MERGING)
def test_no_value_is_read_back_from_the_device(name: str) -> None:
    """Meta tensors have no values: reading one, even to decide on a shape, raises."""
    merged = MERGING[name](*(tensor.to("meta") for tensor in make_tower(40)), 13)
    assert merged.shape == (13, 24) and merged.device.type == "meta"


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("budget", [11, 40])
def test_inputs_are_not_modified_and_not_aliased(name: str, budget: int) -> None:
    tower = make_tower(40)
    before = [tensor.clone() for tensor in tower]
    MERGING[name](*tower, budget).fill_(0.0)
    assert all(torch.equal(old, new) for old, new in zip(before, tower, strict=True))


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"budget": 0}, ValueError, "budget is 0; allowed: an int of at least 1"),
        ({"budget": True}, TypeError, "budget is True; allowed: "),
        (
            {"tower_features": torch.ones(4)},
            ValueError,
            r"tower_features is \(4,\); allowed: \(N, C\) with N, C >= 1",
        ),
        ({"attention": torch.ones(4, 1)}, ValueError, r"attention is \(4, 1\); allowed: \(4,\)"),
        ({"attention": torch.arange(4)}, TypeError, r"attention is torch\.int64; allowed: "),
        ({"keys": torch.ones(5, 2)}, ValueError, r"keys is \(5, 2\); allowed: \(4, K\)"),
        ({"keys": torch.ones(4, 2, device="meta")}, ValueError, "keys is on meta; allowed: cpu"),
    ],
)
def test_invalid_arguments_are_refused(
    name: str, changed: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {
        "tower_features": torch.ones(4, 3),
        "attention": torch.ones(4),
        "keys": torch.ones(4, 2),
        "budget": 9,
    }
    with pytest.raises(error, match=f"^{message}"):
        MERGING[name](**{**arguments, **changed})


class TestVisionZip:
    @pytest.mark.parametrize(
        ("budget", "contextual"),
        [(192, 30), (128, 20), (64, 10), (32, 5), (1, 0), (3, 0), (4, 1), (33, 5), (35, 5)],
    )
    def test_dominant_and_contextual_tokens_are_split_27_to_5(
        self, budget: int, contextual: int
    ) -> None:
        assert contextual_count(budget) == contextual

    def test_hand_computed_example(self) -> None:
        # Of 13 tokens 8 are dominant (all but one of the first nine); for the other five, at
        # 3, 9, 10, 11 and 12, the stride 5 // 2 makes 3 and 10 targets (list positions 0 and 2).
        features = torch.arange(13.0)[:, None] ** 2
        attention = torch.tensor([9.0, 1, 8, 0.1, 7, 2, 6, 3, 5, 0.2, 0.3, 0.4, 0.5])
        keys = torch.zeros(13, 2)
        keys[3], keys[10] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 5.0])
        keys[9], keys[11], keys[12] = torch.tensor([[0.1, 1.0], [2.0, 1.0], [7.0, 0.0]])
        merged = visionzip(features, attention, keys, 10)
        dominant = [0.0, 1, 4, 16, 25, 36, 49, 64]
        assert merged[:, 0].tolist() == [*dominant, 9 + (121 + 144) / 2, 100 + 81]

    def test_a_target_without_members_is_unchanged(self) -> None:
        # With equal keys, all join the first of the three targets 14, 16 and 18.
        features = torch.arange(20.0)[:, None]
        merged = visionzip(features, 20.0 - torch.arange(20.0), torch.ones(20, 2), 17)
        assert merged[:14, 0].tolist() == [*range(14)]
        assert merged[14:, 0].tolist() == [14 + (15 + 17 + 19) / 3, 16, 18]

    def test_a_non_finite_patch_is_not_counted_in_the_mean(self) -> None:
        features = torch.arange(20.0)[:, None]
        features[17] = math.nan
        merged = visionzip(features, 20.0 - torch.arange(20.0), torch.ones(20, 2), 17)
        assert merged[14:, 0].tolist() == [14 + (15 + 19) / 2, 16, 18]

    def test_cls_comes_first_and_counts_as_a_dominant_token(self) -> None:
        features, attention, keys = make_tower(40)
        cls = torch.full((24,), 7.0)
        best = attention.argsort(descending=True)
        for budget in range(1, 44):
            merged = visionzip(features, attention, keys, budget, cls_feature=cls)
            assert merged.shape == (min(budget, 41), 24)
            assert torch.equal(merged[0], cls)
        merged = visionzip(features, attention, keys, 32, cls_feature=cls)
        assert torch.equal(merged[1:27], features[best[:26].sort().values])
        merged = visionzip(features, attention, keys, 32)
        assert torch.equal(merged[:27], features[best[:27].sort().values])

    @pytest.mark.parametrize("budget", [4, 17, 32, 60])
    def test_result_equals_the_plain_loop(self, budget: int) -> None:
        features, attention, keys = make_tower(67)
        contextual = contextual_count(budget)
        dominant = sorted(sorted(range(67), key=lambda i: -attention[i])[: budget - contextual])
        rest = [i for i in range(67) if i not in dominant]
        targets = rest[:: len(rest) // contextual][:contextual]
        joined: dict[int, list[int]] = {target: [] for target in targets}
        unit = keys.double() / keys.double().norm(dim=1, keepdim=True)
        for i in rest:
            if i not in targets:
                joined[max(targets, key=lambda t, i=i: float(unit[i] @ unit[t]))].append(i)
        expected = [features[i] for i in dominant]
        for target, members in joined.items():
            mean = features[members].mean(dim=0) if members else 0
            expected.append(features[target] + mean)
        merged = visionzip(features, attention, keys, budget)
        torch.testing.assert_close(merged, torch.stack(expected))

    def test_cls_must_have_the_width_of_a_patch(self) -> None:
        with pytest.raises(ValueError, match=r"^cls_feature is \(1, 3\); allowed: \(3,\)"):
            visionzip(
                torch.ones(4, 3),
                torch.ones(4),
                torch.ones(4, 2),
                2,
                cls_feature=torch.ones(1, 3),
            )


class TestPruMergePlus:
    @pytest.mark.parametrize(("share", "count"), [(6, 193), (9, 129), (18, 65), (36, 33)])
    def test_published_ratios_of_576_tokens_are_reproduced(self, share: int, count: int) -> None:
        each = 576 // share
        assert 2 * each + 1 == count
        features, attention, keys = make_tower(576)
        kept = salient_and_spaced(attention, each)
        assert kept.unique().numel() == 2 * each
        assert kept[:each].tolist() == attention.argsort(descending=True)[:each].tolist()
        assert (kept[each:].diff() > 0).all()
        # Each salient token between two spaced ones widens their gap by one.
        assert kept[each:].diff().min() >= (576 - each) // each
        assert prumerge_plus(features, attention, keys, count).shape == (count, 24)
        assert prumerge_plus(features, attention, keys, count - 1).shape == (count - 1, 24)

    def test_hand_computed_example(self) -> None:
        # Budget 3 of 34: token 5 by attention, the middle one of the other 33 (17 counted without
        # token 5), and one for all others. With keys on a quarter circle, the nearest key is the
        # nearest index, so only 33 is outside the neighbours of 5, and only 0 outside those of 17.
        angles = torch.linspace(0, 1.5, 34)
        keys = torch.stack([angles.cos(), angles.sin()], dim=1)
        features = torch.zeros(34, 3)
        features[5, 0] = features[17, 1] = 1.0
        features[0, 2], features[33, 2] = 100.0, 1000.0
        attention = torch.full((34,), 0.01)
        attention[5], attention[17], attention[33] = 0.5, 0.02, 0.03
        merged = prumerge_plus(features, attention, keys, 3)
        torch.testing.assert_close(
            merged, torch.tensor([[1.0, 0.02, 1.0], [0.5, 1.0, 30.0], [0.0, 0.0, 31.0]])
        )
        assert torch.equal(prumerge_plus(features, attention, keys, 2), merged[:2])

    @pytest.mark.parametrize("budget", [1, 2, 7, 20, 41])
    def test_result_equals_the_plain_loop(self, budget: int) -> None:
        features, attention, keys = make_tower(67)
        kept = salient_and_spaced(attention, budget // 2).tolist()
        unit = keys.double() / keys.double().norm(dim=1, keepdim=True)
        expected = []
        for i in kept:
            others = sorted((j for j in range(67) if j != i), key=lambda j: -(unit[i] @ unit[j]))
            expected.append(features[i] + sum(attention[j] * features[j] for j in others[:32]))
        if budget % 2:
            dropped = (j for j in range(67) if j not in kept)
            expected.append(sum((attention[j] * features[j] for j in dropped), torch.zeros(24)))
        merged = prumerge_plus(features, attention, keys, budget)
        torch.testing.assert_close(merged, torch.stack(expected), rtol=1e-5, atol=1e-5)
