# SPDX-License-Identifier: Apache-2.0
"""The targets that `vllm_compat` wraps exist, are wrapped once, and still need the wrap.

A test that a wrap is still needed fails on the vLLM release that makes it unnecessary: delete the
wrap then, once that release is the lowest supported one.
"""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import vllm

from flashvlm_vllm.supported_models import FORCED


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def stock(program: str) -> str:
    """Run a program in a process where no plugin is loaded; return its output."""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wrapped_calls_have_the_expected_parameters() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.generate.base.protocol import validate_request_mm_kwargs
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.v1.core.sched.scheduler import Scheduler

    assert parameters(Scheduler._try_schedule_encoder_inputs) == [
        *("self", "request", "num_computed_tokens", "num_new_tokens"),
        *("encoder_compute_budget", "shift_computed_tokens"),
    ]
    assert parameters(OnlineRenderer.preprocess_chat)[:3] == ["self", "request", "messages"]
    assert parameters(EngineArgs.add_cli_args)[:1] == ["parser"]
    assert parameters(EngineArgs.from_cli_args)[:1] == ["args"]
    assert parameters(EngineArgs.create_engine_config)[:1] == ["self"]
    assert set(parameters(validate_request_mm_kwargs)) == {
        "mm_processor_kwargs",
        "media_io_kwargs",
        "trust_request_mm_kwargs",
    }
    for create in (
        OpenAIServingChat.create_chat_completion,
        OpenAIServingChatBatch.create_batch_chat_completion,
        OpenAIServingResponses.create_responses,
    ):
        assert parameters(create)[:3] == ["self", "request", "raw_request"]
    for convert in (
        AnthropicServingMessages.messages_full_converter,
        AnthropicServingMessages.message_stream_converter,
    ):
        assert parameters(convert) == ["self", "generator"]


def test_processor_hooks_that_the_mixin_overrides_have_the_expected_parameters() -> None:
    from vllm.multimodal.processing import BaseMultiModalProcessor
    from vllm.multimodal.processing.inputs import ProcessorInputs

    for hook, names in {
        "apply": ["inputs", "timing_ctx"],
        "_apply_hf_processor_main": ["mm_items", "hf_kwargs"],
        "_get_mm_fields_config": ["hf_inputs", "hf_processor_mm_kwargs"],
        "_get_prompt_updates": ["mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"],
    }.items():
        assert parameters(getattr(BaseMultiModalProcessor, hook)) == ["self", *names], hook
    assert parameters(ProcessorInputs.get_mm_hashes) == ["self", "model_id", "hash_algorithm"]


def test_registering_twice_wraps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers.online_renderer import OnlineRenderer

    from flashvlm_vllm.plugin import register
    from flashvlm_vllm.vllm_compat import attach

    monkeypatch.setenv("VLLM_PLUGINS", "flashvlm")
    register()
    attach.to_serving()
    once = (EngineArgs.create_engine_config, OnlineRenderer.preprocess_chat)
    register()
    attach.to_serving()
    assert once == (EngineArgs.create_engine_config, OnlineRenderer.preprocess_chat)


def test_a_process_without_a_worker_does_not_import_the_model_runners() -> None:
    program = (
        "import os, sys\n"
        "import vllm.v1.engine.core\n"
        "os.environ['VLLM_PLUGINS'] = 'flashvlm'\n"
        "from flashvlm_vllm.plugin import register\n"
        "before = set(sys.modules)\n"
        "register()\n"
        "from vllm.v1.worker.worker_base import WorkerBase\n"
        "print([each for each in set(sys.modules) - before if 'model_runner' in each])\n"
        "print(hasattr(WorkerBase, 'flashvlm_statistics'))"
    )
    assert stock(program).split() == ["[]", "True"]


def test_stock_vllm_still_has_no_flag_to_select_plugins() -> None:
    program = (
        "from vllm.utils.argparse_utils import FlexibleArgumentParser as P\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "flags = EngineArgs.add_cli_args(P())._option_string_actions\n"
        "print('--plugins' in flags, '--visual-budget' in flags)"
    )
    assert stock(program).split() == ["False", "False"]


def test_stock_vllm_still_has_no_config_field_for_plugin_settings() -> None:
    program = (
        "import dataclasses\n"
        "from vllm.config import MultiModalConfig\n"
        "names = {field.name for field in dataclasses.fields(MultiModalConfig)}\n"
        "print([name for name in names if 'plugin' in name or 'extra' in name])"
    )
    assert stock(program).strip() == "[]"


def test_stock_vllm_still_drops_what_it_does_not_know_on_the_messages_route() -> None:
    program = (
        "from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest as R\n"
        "from vllm.entrypoints.anthropic.serving import _build_anthropic_usage as convert\n"
        "from vllm.entrypoints.serve.engine.protocol import UsageInfo\n"
        "request = R(model='m', messages=[], max_tokens=1, visual_budget=64)\n"
        "usage = convert(UsageInfo(prompt_tokens=1, visual_tokens={'kept': 64}))\n"
        "print('visual_budget' in request.model_dump(), 'visual_tokens' in usage.model_dump())"
    )
    assert stock(program).split() == ["False", "False"]


def test_without_being_enabled_the_plugin_registers_no_model_and_wraps_nothing() -> None:
    program = (
        "import os\n"
        "os.environ.pop('VLLM_PLUGINS')\n"
        "from flashvlm_vllm.plugin import register\n"
        "from flashvlm_vllm.supported_models import classes\n"
        "register()\n"
        "from vllm import ModelRegistry\n"
        "from vllm.renderers.online_renderer import OnlineRenderer\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "models = [ModelRegistry.models.get(name) for name in classes()]\n"
        "targets = [model.module_name for model in models if model]\n"
        "wrapped = hasattr(OnlineRenderer.preprocess_chat, '__flashvlm_wrapped__')\n"
        "engine = hasattr(EngineArgs.create_engine_config, '__flashvlm_wrapped__')\n"
        "print(any('flashvlm' in target for target in targets), wrapped, engine)"
    )
    assert stock(program).split() == ["False", "False", "False"]


@pytest.mark.parametrize("covered", [True, False])
@pytest.mark.parametrize("setting", ["cudagraph_mm_encoder", "compile_mm_encoder"])
def test_encoder_graphs_and_compilation_stay_on(
    covered: bool, setting: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from flashvlm_vllm.plugin import register
    from testing.tiny.llava import build_llava, build_text_llama

    monkeypatch.setenv("VLLM_PLUGINS", "flashvlm")
    register()
    model = build_llava(tmp_path / "llava") if covered else build_text_llama(tmp_path / "llama")
    arguments = EngineArgs(model=str(model), compilation_config={setting: True}, max_model_len=1024)
    config = arguments.create_engine_config()
    assert getattr(config.compilation_config, setting)


@pytest.mark.parametrize("covered", [True, False])
def test_lora_on_the_vision_tower_is_refused_for_covered_models(
    covered: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from flashvlm_vllm.plugin import register
    from testing.tiny.llava import build_llava, build_text_llama

    monkeypatch.setenv("VLLM_PLUGINS", "flashvlm")
    register()
    model = build_llava(tmp_path / "llava") if covered else build_text_llama(tmp_path / "llama")
    arguments = EngineArgs(
        model=str(model),
        enable_lora=True,
        enable_tower_connector_lora=True,
        max_model_len=1024,
    )
    if not covered:
        assert arguments.create_engine_config().lora_config.enable_tower_connector_lora
        return
    with pytest.raises(ValueError, match="leave that option out"):
        arguments.create_engine_config()
    arguments.enable_tower_connector_lora = False
    assert arguments.create_engine_config().lora_config is not None


@pytest.mark.parametrize("is_general", [True, False])
def test_pruning_of_videos_is_refused_with_the_general_adapter(
    is_general: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from flashvlm_vllm.plugin import register
    from testing.tiny.qwen_vl import build_qwen_vl

    monkeypatch.setenv("VLLM_PLUGINS", "flashvlm")
    register()
    if is_general:
        monkeypatch.setenv(FORCED, "Qwen2_5_VLForConditionalGeneration")
    model = build_qwen_vl(tmp_path / "qwen", "2.5")
    arguments = EngineArgs(model=str(model), video_pruning_rate=0.5, max_model_len=1024)
    if is_general:
        with pytest.raises(ValueError, match="which has the general adapter"):
            arguments.create_engine_config()
    else:
        arguments.create_engine_config()


def test_stock_vllm_still_maps_lora_adapters_to_rows_once_for_all_encoder_calls() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner._execute_mm_encoder)
    mapped = source.rindex("self.lora_manager.set_active_adapters")
    assert mapped < source.index("in group_and_batch_mm_kwargs(")


def test_stock_vllm_still_runs_encoder_graphs_instead_of_the_model() -> None:
    from vllm.v1.worker.encoder_cudagraph import EncoderCudaGraphManager
    from vllm.v1.worker.gpu.mm.encoder_runner import EncoderRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert parameters(EncoderCudaGraphManager.execute) == ["self", "mm_kwargs"]
    first = inspect.getsource(GPUModelRunner._execute_mm_encoder)
    assert "encoder_cudagraph_manager.execute" in first
    second = inspect.getsource(EncoderRunner.execute_mm_encoder)
    assert "cg_manager.execute" in second
    for source in (first, second):
        # A call that returns None is run by the model.
        assert "cudagraph_output is not None" in source
        assert "embed_multimodal(**mm_kwargs_batch)" in source


def test_stock_vllm_still_counts_the_encoder_embeds_of_an_item_by_its_kept_embeddings() -> None:
    from vllm.v1.request import Request

    assert "mm_position.get_num_embeds()" in inspect.getsource(Request.get_num_encoder_embeds)


def test_stock_vllm_still_does_not_notify_models_of_reset_encoder_cache() -> None:
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert parameters(Executor.reset_encoder_cache) == ["self"]
    assert "self.model" not in inspect.getsource(GPUModelRunner.reset_encoder_cache)


def test_stock_vllm_still_returns_only_the_first_engines_result_from_collective_rpc() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import AsyncMPClient, DPLBAsyncMPClient

    assert "call_utility_async" in inspect.getsource(AsyncMPClient.collective_rpc_async)
    assert ")[0]" in inspect.getsource(DPLBAsyncMPClient.call_utility_async)
    # Called in its place.
    assert parameters(AsyncMPClient._call_utility_async) == ["self", "method", "args", "engine"]
    assert "self.engine_core" in inspect.getsource(AsyncLLM.collective_rpc)


def test_the_lowest_release_still_does_not_sort_processor_arguments_by_modality() -> None:
    from vllm.model_executor.models.qwen3_vl import Qwen3VLProcessingInfo

    from flashvlm_vllm.vllm_releases import LOWEST, release_of

    sorts = hasattr(Qwen3VLProcessingInfo, "_merge_and_resolve_mm_processor_kwargs")
    assert sorts is (release_of(vllm.__version__) != (0, 31))
    assert LOWEST == (0, 31), "`video_arguments` is not needed any more"


def test_the_lowest_release_still_lets_the_first_of_two_equal_routes_answer() -> None:
    from vllm.plugins.endpoint_plugins import interface

    from flashvlm_vllm.vllm_releases import LOWEST, release_of

    replaces = "app.router.routes" in inspect.getsource(interface)
    assert replaces is (release_of(vllm.__version__) != (0, 31))
    assert LOWEST == (0, 31), "`remove_route` is not needed any more"


def test_other_names_in_the_variable_hide_the_flag_as_the_quick_start_says() -> None:
    command = "from vllm.entrypoints.cli.main import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", command, "serve", "a-model", "--plugins", "flashvlm"],
        env={**os.environ, "VLLM_PLUGINS": "another_plugin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2
    message = result.stderr.strip().splitlines()[-1].partition(": ")[2]
    assert message == "error: unrecognized arguments: --plugins flashvlm"
    page = Path(__file__).parents[2] / "docs" / "users" / "quickstart.md"
    assert message in page.read_text()
