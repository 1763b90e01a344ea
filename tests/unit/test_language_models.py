# SPDX-License-Identifier: Apache-2.0
"""Which language models selectors can use."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.config import ModelConfig, ParallelConfig

from flashvlm_vllm.language_models import FIRST_LAYERS, LANGUAGE_MODELS, why_not_used
from flashvlm_vllm.worker.language_attention import LAYERS


class Model:
    """A model's configuration, with vLLM's own split of its layers."""

    get_num_layers = ModelConfig.get_num_layers
    get_layers_start_end_indices = ModelConfig.get_layers_start_end_indices

    def __init__(self, kind: str, layers: int) -> None:
        self.hf_text_config = SimpleNamespace(model_type=kind)
        self._layers = layers

    def get_total_num_hidden_layers(self) -> int:
        return self._layers


def config(kind: str, layers: int = 6, stages: int = 1) -> SimpleNamespace:
    parallel = ParallelConfig(pipeline_parallel_size=stages)
    return SimpleNamespace(model_config=Model(kind, layers), parallel_config=parallel)


@pytest.mark.parametrize("kind", sorted(LANGUAGE_MODELS))
def test_allowed_types_can_be_used(kind: str) -> None:
    assert why_not_used(config(kind)) is None
    assert why_not_used(config(kind, layers=3)) is None
    assert why_not_used(config(kind, layers=6, stages=2)) is None
    # The first stage has three of them, the last one two.
    assert why_not_used(config(kind, layers=11, stages=4)) is None


def test_the_layers_are_as_many_as_the_worker_uses() -> None:
    assert FIRST_LAYERS == LAYERS


@pytest.mark.parametrize("kind", ["qwen3_5_text", "chatglm", "Llama", ""])
def test_another_type_is_named_with_the_allowed_ones(kind: str) -> None:
    reason = why_not_used(config(kind))
    assert reason is not None
    assert f"of type {kind};" in reason
    for known in LANGUAGE_MODELS:
        assert known in reason


@pytest.mark.parametrize(("layers", "stages"), [(1, 1), (2, 1), (4, 2), (3, 2), (4, 4), (10, 4)])
def test_three_layers_must_be_on_the_first_stage(layers: int, stages: int) -> None:
    reason = why_not_used(config("llama", layers, stages))
    assert reason == "the first pipeline stage has fewer than 3 decoder layers"


def test_the_split_that_a_deployment_sets_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "3,1")
    assert why_not_used(config("llama", 4, 2)) is None
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "2,4")
    assert why_not_used(config("llama", 6, 2)) is not None
