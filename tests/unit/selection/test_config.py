# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import math

import pytest

from flashvlm_vllm.selection import ABLATIONS, SelectionConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text_weight", -0.1),
        ("text_weight", 1.1),
        ("text_weight", math.nan),
        ("text_weight", True),
        ("text_weight", "half"),
        ("aggregation_temperature", 0.0),
        ("aggregation_temperature", math.inf),
        ("sharpening", 1),
        ("sharpening_temperature", -0.01),
        ("sharpening_power", 0),
        ("gate_fraction", 1.5),
        ("attenuation", -1),
        ("query_gate", "G2"),
        ("fusion", "geometric"),
        ("important_fraction", 2),
        ("removed_per_round", 0),
        ("removed_per_round", 8.0),
        ("removed_per_round", True),
        ("schedule", "linear"),
        ("removed_fraction", 0.0),
        ("removed_fraction", 0.51),
        ("removed_fraction", True),
        ("block_length", 3),
        ("block_length", 512.0),
        ("epsilon", 0.0),
        ("epsilon", 1.0),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_field_name(field: str, value: object) -> None:
    with pytest.raises(ValueError) as refusal:
        SelectionConfig(**{field: value})  # type: ignore[arg-type]
    assert f"SelectionConfig.{field} is {value!r}; allowed: " in str(refusal.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text_weight", 0),
        ("text_weight", 1),
        ("gate_fraction", 0),
        ("gate_fraction", 1),
        ("attenuation", 0),
        ("attenuation", 1),
        ("important_fraction", 0),
        ("important_fraction", 1),
        ("removed_per_round", 1),
        ("removed_fraction", 0.5),
        ("block_length", 4),
    ],
)
def test_limits_of_a_range_are_allowed(field: str, value: int) -> None:
    assert getattr(SelectionConfig(**{field: value}), field) == value  # type: ignore[arg-type]


def test_the_config_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SelectionConfig().text_weight = 7.0  # type: ignore[misc]


def test_each_ablation_changes_one_field() -> None:
    published = dataclasses.asdict(SelectionConfig())
    changed = {
        name: {k: v for k, v in dataclasses.asdict(config).items() if v != published[k]}
        for name, config in ABLATIONS.items()
    }
    assert changed == {
        "without_text_guidance": {"text_weight": 0.0},
        "without_visual_saliency": {"text_weight": 1.0},
        "without_diversity_reserve": {"important_fraction": 1.0},
        "linear_fusion": {"fusion": "linear"},
        "without_text_sharpening": {"sharpening": False},
        "without_query_gating": {"query_gate": "none"},
    }
