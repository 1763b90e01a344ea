# SPDX-License-Identifier: Apache-2.0
"""Which language models selectors can use."""

from types import SimpleNamespace

import pytest

from flashvlm_vllm.language_models import LANGUAGE_MODELS, why_not_used


def config(kind: str, on_first_stage: int = 3) -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(model_type=kind),
            get_num_layers=lambda parallel: {"one stage": on_first_stage}[parallel],
        ),
        parallel_config="one stage",
    )


@pytest.mark.parametrize("kind", sorted(LANGUAGE_MODELS))
def test_allowed_types_can_be_used(kind: str) -> None:
    assert why_not_used(config(kind)) is None
    assert why_not_used(config(kind, 12)) is None


@pytest.mark.parametrize("kind", ["qwen3_5_text", "chatglm", "Llama", ""])
def test_another_type_is_named_with_the_allowed_ones(kind: str) -> None:
    reason = why_not_used(config(kind))
    assert reason is not None
    assert f"of type {kind};" in reason
    for known in LANGUAGE_MODELS:
        assert known in reason


@pytest.mark.parametrize("layers", [1, 2])
def test_three_layers_must_be_on_the_first_stage(layers: int) -> None:
    reason = why_not_used(config("llama", layers))
    assert reason == "the first pipeline stage has fewer than 3 decoder layers"
