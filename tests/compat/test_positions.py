# SPDX-License-Identifier: Apache-2.0
"""The wraps by which kept tokens keep their positions: there, for covered models only, needed."""

import inspect
import logging
from pathlib import Path
from typing import Any

import pytest

from demo.tiny_llava import build_text_llama
from flashvlm_vllm import schemes
from tests.tiny.internvl import build_internvl_hf
from tests.tiny.qwen_vl import build_qwen_vl


@pytest.mark.parametrize("family", ["with M-RoPE", "with RoPE", "not known", "not covered"])
def test_runners_ask_for_positions_where_a_covered_model_has_rotary_ones(
    family: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from flashvlm_vllm.plugin import register

    monkeypatch.setenv("VLLM_PLUGINS", "flashvlm")
    register()
    path = tmp_path / "model"
    build: Any = {
        "with M-RoPE": lambda path: build_qwen_vl(path, "2.5"),
        "not covered": build_text_llama,
    }
    model = build.get(family, build_internvl_hf)(path)
    if family == "not known":
        monkeypatch.setattr(schemes, "_ROTARY", ())
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    config = EngineArgs(model=str(model), max_model_len=1024).create_engine_config().model_config
    channels = {"with M-RoPE": 3, "with RoPE": schemes.LINE_CHANNELS}.get(family, 0)
    assert config.uses_mrope is bool(channels)
    assert config.mrope_num_dims == channels
    told = [each.message for each in caplog.records]
    said = [each for each in told if "places of kept tokens close up" in each]
    assert len(said) == (family == "not known")
    multimodal = config.multimodal_config
    if family == "not covered":
        assert multimodal is None
        return
    assert multimodal is not None
    assert multimodal.is_multimodal_pruning_enabled() is bool(channels)
    # Nothing is said about vLLM's own pruning, which stays off.
    assert multimodal.get_video_pruning_spec() is None


def test_stock_vllm_still_asks_only_models_with_three_axes_for_positions() -> None:
    from vllm.config import ModelConfig

    for name in ("uses_mrope", "mrope_num_dims"):
        stock = getattr(ModelConfig, name).fget
        source = inspect.getsource(getattr(stock, "__wrapped__", stock))
        assert f"return {name}(self.hf_config)" in source


def test_prompt_and_sampling_parameters_still_meet_where_requests_are_made() -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    made = getattr(InputProcessor.process_inputs, "__wrapped__", InputProcessor.process_inputs)
    source = inspect.getsource(made)
    assert list(inspect.signature(made).parameters)[:4] == [
        "self",
        "request_id",
        "prompt",
        "params",
    ]
    assert "sampling_params.max_tokens = (" in source
    assert "identifier=" in source


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
