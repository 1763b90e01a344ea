# SPDX-License-Identifier: Apache-2.0
"""The wraps by which kept tokens keep their positions: there, for covered models only, needed."""

import inspect
from pathlib import Path

import pytest

from tests.tiny.internvl import build_internvl_hf
from tests.tiny.qwen_vl import build_qwen_vl


@pytest.mark.parametrize("family", ["with M-RoPE", "without"])
def test_runners_ask_for_positions_where_a_covered_model_has_three(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from flashvlm_vllm.plugin import register

    monkeypatch.setenv("VLLM_PLUGINS", "flashvlm")
    register()
    has_three = family == "with M-RoPE"
    path = tmp_path / "model"
    model = build_qwen_vl(path, "2.5") if has_three else build_internvl_hf(path)
    config = EngineArgs(model=str(model), max_model_len=1024).create_engine_config()
    multimodal = config.model_config.multimodal_config
    assert multimodal is not None
    assert multimodal.is_multimodal_pruning_enabled() is has_three
    # Nothing is said about vLLM's own pruning, which stays off.
    assert multimodal.get_video_pruning_spec() is None


def test_stock_vllm_still_asks_for_positions_where_it_prunes_videos_only() -> None:
    from vllm.config import MultiModalConfig

    source = inspect.getsource(MultiModalConfig.is_multimodal_pruning_enabled)
    assert "get_video_pruning_spec" in source


def test_the_cpu_runner_still_does_not_ask_whether_a_model_prunes() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    asks = "is_multimodal_pruning_enabled"
    assert asks in inspect.getsource(GPUModelRunner.load_model)
    stock = getattr(CPUModelRunner.load_model, "__wrapped__", CPUModelRunner.load_model)
    assert asks not in inspect.getsource(stock)
