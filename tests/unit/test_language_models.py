# SPDX-License-Identifier: Apache-2.0
"""Which language models selectors can use."""

from types import SimpleNamespace

import pytest

from flashvlm_vllm.language_models import LANGUAGE_MODELS, why_not_used


def config(kind: str, layers: int = 4, stages: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(model_type=kind, num_hidden_layers=layers)
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
    )


@pytest.mark.parametrize("kind", sorted(LANGUAGE_MODELS))
def test_allowed_types_can_be_used(kind: str) -> None:
    assert why_not_used(config(kind)) is None
    assert why_not_used(config(kind, layers=2)) is None
    assert why_not_used(config(kind, layers=4, stages=2)) is None


@pytest.mark.parametrize("kind", ["qwen3_5_text", "chatglm", "Llama", ""])
def test_another_type_is_named_with_the_allowed_ones(kind: str) -> None:
    reason = why_not_used(config(kind))
    assert reason is not None
    assert f"of type {kind};" in reason
    for known in LANGUAGE_MODELS:
        assert known in reason


@pytest.mark.parametrize(("layers", "stages"), [(1, 1), (3, 2), (4, 4)])
def test_two_layers_must_be_on_the_first_stage(layers: int, stages: int) -> None:
    reason = why_not_used(config("llama", layers, stages))
    assert reason == "the first pipeline stage has fewer than 2 decoder layers"
