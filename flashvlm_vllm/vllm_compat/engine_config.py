# SPDX-License-Identifier: Apache-2.0
"""Wraps the engine configuration: attaches settings, refuses incompatible options."""

import sys
from dataclasses import replace
from typing import Any, Final, NoReturn

from flashvlm_vllm.language_models import why_not_used
from flashvlm_vllm.position_scheme import axes_of
from flashvlm_vllm.request.selector_name import SELECTOR
from flashvlm_vllm.request.visual_positions import VisualPositions
from flashvlm_vllm.settings import ENGINE_SETTINGS, ServerSettings, set_settings, settings_of
from flashvlm_vllm.supported_models import covers, is_general, may_fail, rows, why_not_covered
from flashvlm_vllm.vllm_compat.wrap import Entry, Wrap

FROM_COMMAND_LINE: Final = "_flashvlm_from_command_line"
"""Attribute of engine arguments that were parsed from a command line."""


def _create_engine_config(original: Any, engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    config = _config_with_settings(original, engine_args, *args, **kwargs)
    try:
        _refuse_adapters_on_towers(config)
        _refuse_video_pruning(config.model_config)
    except ValueError as error:
        _stop(engine_args, error)
    try:
        _set_facts(config)
    except ValueError as error:
        _stop(engine_args, error)
    return config


def _config_with_settings(original: Any, engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    given = engine_args.mm_processor_kwargs
    values = {name: given[name] for name in ENGINE_SETTINGS if name in (given or {})}
    if not values:
        return original(engine_args, *args, **kwargs)
    try:
        settings = _checked(values)
    except ValueError as error:
        _stop(engine_args, error)
    others = {key: value for key, value in given.items() if key not in values}
    engine_args.mm_processor_kwargs = others or None
    try:
        config = original(engine_args, *args, **kwargs)
    finally:
        engine_args.mm_processor_kwargs = given
    if settings != ServerSettings():
        try:
            _attach(config.model_config, settings, values)
        except ValueError as error:
            _stop(engine_args, error)
    return config


def _checked(asked: dict[str, Any]) -> ServerSettings:
    from flashvlm_vllm.selection.registry import find_selector

    settings = ServerSettings.parse(asked)
    find_selector(settings.default_selector)
    return settings


def _attach(model_config: Any, settings: ServerSettings, asked: dict[str, Any]) -> None:
    if not covers(model_config):
        names = [name for name in asked if asked[name] is not None]
        raise ValueError(
            f"a server-wide {' or '.join(names)} needs a model that is covered; "
            f"{model_config.model} is not: {why_not_covered(model_config)}"
        )
    set_settings(model_config, settings)


def _refuse_adapters_on_towers(config: Any) -> None:
    lora = config.lora_config
    if lora is not None and lora.enable_tower_connector_lora and covers(config.model_config):
        raise ValueError(
            "LoRA on the vision tower or projector (enable_tower_connector_lora) cannot be "
            "combined with visual budgets: images could be encoded with another request's "
            "adapter; leave that option out (adapters on the language model work), or leave out "
            "--plugins flashvlm"
        )


def _refuse_video_pruning(model_config: Any) -> None:
    if not is_general(model_config.architecture):
        return
    if model_config.multimodal_config.get_video_pruning_spec() is not None:
        raise ValueError(
            f"--video-pruning-rate cannot be combined with visual budgets for "
            f"{model_config.architecture}, which has the general adapter: vLLM's positions of "
            "pruned videos are rounded; leave that option out, or leave out --plugins flashvlm"
        )


def _set_facts(config: Any) -> None:
    """Add to the settings what follows from the engine's configuration."""
    from flashvlm_vllm.selection.registry import find_selector

    model_config = config.model_config
    if not covers(model_config) or settings_of(model_config).position_axes:
        return
    settings = replace(
        settings_of(model_config),
        position_axes=axes_of(model_config),
        no_llm_selectors=why_not_used(config),
        model_may_fail=may_fail(model_config.architecture),
    )
    default = settings.default_selector
    if settings.no_llm_selectors is not None and find_selector(default).uses_llm:
        raise ValueError(f"{SELECTOR} {default} cannot be used: {settings.no_llm_selectors}")
    set_settings(model_config, settings)
    row = rows().get(model_config.architecture)
    if row is not None:
        from vllm.logger import init_logger

        init_logger("vllm.flashvlm").info("flashvlm: %s: %s", model_config.architecture, row)
    if not settings.position_axes and settings.default_positions is VisualPositions.KEPT:
        from vllm.logger import init_logger

        init_logger("vllm.flashvlm").warning(
            "flashvlm: %s has an unknown position scheme (known are rotary embeddings and M-RoPE); "
            "kept tokens get consecutive positions",
            model_config.architecture,
        )


def _stop(engine_args: Any, error: ValueError) -> NoReturn:
    """Exit with a one-line message in a server; raise the error in a program that uses ``LLM``."""
    if getattr(engine_args, FROM_COMMAND_LINE, False):
        sys.exit(f"flashvlm: {error}")
    raise error


WRAPS: Final = (
    Wrap(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        "Default budget and selector must be passed to this plugin's processor but not to the "
        "Hugging Face processor, which gets all mm_processor_kwargs.",
        "0.32",
        "vLLM's multimodal config supports plugin settings.",
        wrapper=_create_engine_config,
    ),
)

RESTRICTIONS: Final = (
    Entry(
        "vllm.config:LoRAConfig.enable_tower_connector_lora",
        "vLLM maps adapters to rows of the tower's input once per step. Images with and without a "
        "budget are encoded in separate calls, each starting at the first row, so an image could "
        "be encoded with another request's adapter; the option is refused for covered models.",
        "0.32",
        "Each call of the encoder has its own mapping.",
        "https://github.com/vllm-project/vllm/pull/53849",
    ),
    Entry(
        "vllm.config:MultiModalConfig.video_pruning_rate",
        "vLLM appends rounded positions to the embeddings of pruned videos, this plugin "
        "exact ones. The general adapter does not prune videos without a budget itself; the option "
        "is refused for its models.",
        "0.32",
        "The general adapter prunes such videos, as the adapters of Qwen2.5-VL and others do.",
    ),
)
