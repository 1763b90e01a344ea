# SPDX-License-Identifier: Apache-2.0
"""Wraps vLLM's model runners, so that they get the positions of kept tokens from the model."""

from typing import Any, Final

from flashvlm_vllm.position_scheme import LINE_CHANNELS
from flashvlm_vllm.settings import settings_of, settings_on
from flashvlm_vllm.vllm_compat.wrap import Kind, Wrap


def _is_pruning_enabled(original: Any, multimodal_config: Any) -> bool:
    return bool(settings_on(multimodal_config).position_axes) or original(multimodal_config)


def _uses_mrope(original: Any, model_config: Any) -> bool:
    return bool(settings_of(model_config).position_axes) or original(model_config)


def _mrope_num_dims(original: Any, model_config: Any) -> int:
    dims: int = original(model_config)
    return LINE_CHANNELS if settings_of(model_config).position_axes == 1 else dims


def _calc_mrope_positions(original: Any, runner: Any, scheduler_output: Any) -> None:
    batch = runner.input_batch
    count = len(batch.req_ids)
    one_each = scheduler_output.total_num_scheduled_tokens == count
    if one_each and settings_of(runner.model_config).position_axes == 1:
        requests = [runner.requests[name] for name in batch.req_ids]
        ids = [each.prompt_token_ids for each in requests]
        if None not in ids:
            computed = batch.num_computed_tokens_cpu[:count]
            if (computed >= [len(each) for each in ids]).all():
                ahead = [each.mrope_position_delta for each in requests]
                runner.mrope_positions.np[:, :count] = computed + ahead
                return
    original(runner, scheduler_output)


def _load_model_on_cpu(original: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    original(runner, *args, **kwargs)
    config = runner.model_config.multimodal_config
    runner.is_multimodal_pruning_enabled = (
        config is not None
        and config.is_multimodal_pruning_enabled()
        and getattr(runner.get_model(), "supports_multimodal_pruning", False)
    )


_ASKS_MODELS: Final = "The runners check whether the model computes its own positions."

CONFIG_WRAPS: Final = (
    Wrap(
        "vllm.config:ModelConfig.uses_mrope",
        "The runners get positions from the model only if this is true, which it is only for "
        "models with three axes.",
        "0.32",
        _ASKS_MODELS,
        wrapper=_uses_mrope,
        kind=Kind.PROPERTY,
    ),
    Wrap(
        "vllm.config:ModelConfig.mrope_num_dims",
        "A model with an ordinary rotary embedding needs two channels of positions, not three.",
        "0.32",
        _ASKS_MODELS,
        wrapper=_mrope_num_dims,
        kind=Kind.PROPERTY,
    ),
    Wrap(
        "vllm.config:MultiModalConfig.is_multimodal_pruning_enabled",
        "The runners get the positions of kept tokens from the model only if this is true, and it "
        "depends on --video-pruning-rate only.",
        "0.32",
        "The runners check whether the model prunes.",
        "https://github.com/vllm-project/vllm/issues/45098",
        wrapper=_is_pruning_enabled,
    ),
)
"""Of what the runners ask of the configuration."""
WRAPS: Final = (
    Wrap(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._calc_mrope_positions",
        "It loops over all requests in every step, which is not run without the plugin for a model "
        "with an ordinary rotary embedding. While all requests decode, one vector sum gives the "
        "same result.",
        "0.32",
        "The V1 model runner computes the positions of all requests together.",
        "https://github.com/vllm-project/vllm/pull/13793",
        wrapper=_calc_mrope_positions,
    ),
    Wrap(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model",
        "It does not call its base class, which checks whether the model prunes, so position "
        "channels would remain in the embeddings (with --video-pruning-rate as well).",
        "0.32",
        "It checks this as its base class does.",
        wrapper=_load_model_on_cpu,
    ),
)
