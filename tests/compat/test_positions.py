# SPDX-License-Identifier: Apache-2.0
"""The wraps that preserve positions of kept tokens: needed, and installed for covered models."""

import inspect
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from flashvlm_vllm import position_scheme
from flashvlm_vllm.settings import ServerSettings, set_settings
from flashvlm_vllm.vllm_compat import runners
from flashvlm_vllm.worker.positioned_model import check_rotary_tables
from testing.tiny.internvl import build_internvl_hf
from testing.tiny.llava import build_text_llama
from testing.tiny.qwen_vl import build_qwen_vl


@pytest.mark.parametrize("family", ["with M-RoPE", "with RoPE", "not known", "not covered"])
def test_runners_request_positions_for_covered_models_with_rotary_embeddings(
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
        monkeypatch.setattr(position_scheme, "_ROTARY", ())
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    config = EngineArgs(model=str(model), max_model_len=1024).create_engine_config().model_config
    channels = {"with M-RoPE": 3, "with RoPE": position_scheme.LINE_CHANNELS}.get(family, 0)
    assert config.uses_mrope is bool(channels)
    assert config.mrope_num_dims == channels
    messages = [each.message for each in caplog.records]
    warnings = {each for each in messages if "kept tokens get consecutive positions" in each}
    assert len(warnings) == (family == "not known")
    multimodal = config.multimodal_config
    if family == "not covered":
        assert multimodal is None
        return
    assert multimodal is not None
    assert multimodal.is_multimodal_pruning_enabled() is bool(channels)
    # vLLM's own pruning stays off.
    assert multimodal.get_video_pruning_spec() is None


def test_stock_vllm_still_requests_positions_only_for_models_with_mrope() -> None:
    from vllm.config import ModelConfig

    for name in ("uses_mrope", "mrope_num_dims"):
        stock = getattr(ModelConfig, name).fget
        source = inspect.getsource(getattr(stock, "__wrapped__", stock))
        assert f"return {name}(self.hf_config)" in source


@pytest.mark.parametrize("form", ["decoding", "one prefills", "two tokens", "embeddings", "M-RoPE"])
def test_positions_of_a_step_equal_those_of_vllms_loop(form: str) -> None:
    """If all requests decode, their positions are computed together."""
    draw = np.random.default_rng(0)
    names = [str(number) for number in range(9)]
    prompts = {name: int(draw.integers(3, 50)) for name in names}
    requests = {
        name: SimpleNamespace(
            prompt_token_ids=[1] * prompts[name],
            prompt_embeds=None,
            mrope_positions=torch.arange(prompts[name]).expand(2, -1) + 7,
            mrope_position_delta=int(draw.integers(0, 900)),
        )
        for name in names
    }
    computed = np.array([prompts[name] + int(draw.integers(0, 5)) for name in names])
    scheduled = dict.fromkeys(names, 1)
    if form == "one prefills":
        computed[4] = 2
    elif form == "two tokens":
        scheduled["3"] = 2
    elif form == "embeddings":
        requests["2"].prompt_embeds = torch.zeros(prompts["2"], 4)
        requests["2"].prompt_token_ids = None
    config = SimpleNamespace(multimodal_config=SimpleNamespace())
    set_settings(config, ServerSettings(position_axes=3 if form == "M-RoPE" else 1))

    def run(calculate: Any) -> torch.Tensor:
        buffer = torch.full((2, 20), -1)
        runner = SimpleNamespace(
            model_config=config,
            requests=requests,
            input_batch=SimpleNamespace(req_ids=names, num_computed_tokens_cpu=computed),
            mrope_positions=SimpleNamespace(cpu=buffer, np=buffer.numpy()),
        )
        output = SimpleNamespace(
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
        )
        calculate(runner, output)
        return buffer

    wrapped = GPUModelRunner._calc_mrope_positions
    original = getattr(wrapped, "__wrapped__", wrapped)
    ours = run(lambda *given: runners._calc_mrope_positions(original, *given))
    assert ours.equal(run(original))
    assert (ours[0] >= 0).sum() == sum(scheduled.values())


def test_vllm_still_has_prompt_and_sampling_parameters_in_process_inputs() -> None:
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


def test_stock_vllm_still_enables_pruning_positions_only_for_video_pruning() -> None:
    from vllm.config import MultiModalConfig

    source = inspect.getsource(MultiModalConfig.is_multimodal_pruning_enabled)
    assert "get_video_pruning_spec" in source


def test_the_cpu_runner_still_does_not_check_whether_pruning_is_enabled() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    check = "is_multimodal_pruning_enabled"
    assert check in inspect.getsource(GPUModelRunner.load_model)
    stock = getattr(CPUModelRunner.load_model, "__wrapped__", CPUModelRunner.load_model)
    assert check not in inspect.getsource(stock)


@pytest.mark.parametrize(("rows", "fits"), [([64, 64], True), ([64, 63], False), ([], True)])
def test_a_rotary_table_that_is_too_short_fails_at_start(rows: list[int], fits: bool) -> None:
    language_model = torch.nn.Module()
    for number, length in enumerate(rows):
        layer = torch.nn.Module()
        layer.register_buffer("cos_sin_cache", torch.zeros(length, 8))
        language_model.add_module(str(number), layer)
    model = SimpleNamespace(get_language_model=lambda: language_model)
    if fits:
        check_rotary_tables(model, 64)
        return
    with pytest.raises(ValueError, match="has 63 positions, but its configuration says 64"):
        check_rotary_tables(model, 64)
