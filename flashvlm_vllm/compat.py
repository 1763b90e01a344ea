# SPDX-License-Identifier: Apache-2.0
"""Every place where vLLM offers no hook and is wrapped, with the reason and the end of each.

Nothing else in this package changes vLLM. Each wrap keeps the original's behaviour, adds one
call, and is applied once per process.
"""

import copy
import functools
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from flashvlm_vllm.budget import BUDGET, parse_budget, parse_budget_text
from flashvlm_vllm.encoder_load import schedule_whole_items
from flashvlm_vllm.feature_cache import (
    DEFAULT_GB,
    FEATURE_CACHE_GB,
    parse_feature_cache_gb,
)
from flashvlm_vllm.selector import SELECTOR
from flashvlm_vllm.visual_positions import (
    VISUAL_POSITIONS,
    VisualPositions,
    axes_on,
    default_positions,
    parse_positions,
    position_axes,
    set_position_axes,
)

SETTINGS = (BUDGET, SELECTOR, VISUAL_POSITIONS, FEATURE_CACHE_GB)
"""What an engine is started with, as flags or as processor arguments."""

EXPLAIN_PER_MINUTE = "visual_explain_per_minute"
SERVING_SETTINGS = (EXPLAIN_PER_MINUTE, "visual_playground")
"""What an API process is started with, as flags; the engine does not know them."""

_WRAPPED = "__flashvlm_wrapped__"
_FROM_COMMAND_LINE = "_flashvlm_from_command_line"


def add_command_line_flags(activate: Callable[[], None]) -> None:
    """Give ``vllm serve`` and ``vllm run-batch`` ``--plugins`` and the visual defaults' flags.

    Args:
        activate: starts the plugin, once ``--plugins`` names it.

    Why: vLLM names plugins in the variable ``VLLM_PLUGINS`` only, and has no hook through which
    a plugin adds flags. Seen: 0.32. End: when vLLM has ``--plugins`` and a flag hook.
    """
    from vllm.engine.arg_utils import EngineArgs

    add_arguments = functools.partial(_add_cli_args, activate=activate)
    _wrap(EngineArgs, "add_cli_args", add_arguments, static=True)
    _wrap(EngineArgs, "from_cli_args", _from_cli_args, classmethod_=True)
    # Only in the process that parses a command line, which has imported it by now.
    serve = sys.modules.get("vllm.entrypoints.cli.serve")
    if serve is not None:
        _wrap(serve.ServeSubcommand, "validate", _validate)


def is_command_line() -> bool:
    """Tell whether this process parses a ``vllm`` command line."""
    return "vllm.entrypoints.cli.serve" in sys.modules


def attach_to_engine() -> None:
    """Wrap what every engine needs, offline ones too.

    ``EngineArgs.create_engine_config``. Why: default budget and selector must reach the processor
    without being passed to the Hugging Face processor, as ``mm_processor_kwargs`` are. Seen: 0.32.
    End: when vLLM's multimodal config takes plugin settings. There CUDA graphs of the encoder are
    turned off for covered models as well: they return all of an image's tokens without calling
    ``embed_multimodal``, whatever its placeholder holds. End: when graphs hand over to the model.
    So is its compilation: a compiled tower does not tell its hooks what enters the attention.
    End: when towers return saliency.
    And LoRA on towers is refused; see ``_refuse_adapters_on_towers``.

    ``WorkerBase``. Why: named worker methods are what ``collective_rpc`` can call without
    pickling code. Seen: 0.32. End: when worker metrics have a channel of their own.

    ``Executor.reset_encoder_cache``. Why: whoever has vLLM forget what its encoder computed (new
    weights, as a rule) means the features that this plugin remembers too, and the model is not
    told. Seen: 0.32. End: when models are.

    ``ModelConfig.uses_mrope`` and ``mrope_num_dims``. Why: only where it is true do the runners ask
    a model for positions, and it is true of models with three axes only. Seen: 0.32. End: when the
    runners ask the model whether it has positions of its own.

    ``MultiModalConfig.is_multimodal_pruning_enabled``. Why: only where it is true do the runners
    ask a model for the positions of what it kept, and it knows of ``--video-pruning-rate`` only.
    Seen: 0.32. End: when the runners ask the model whether it prunes.

    ``GPUModelRunner._calc_mrope_positions``. Why: it is a loop over all requests in every step,
    which a model with an ordinary rotary embedding does not pay without the plugin; while all
    requests decode one sum does. Seen: 0.32. End: when the first runner computes them together.

    ``InputProcessor.process_inputs``. Why: it is where a processed prompt and the longest answer
    allowed first meet, on every endpoint and offline; both together must fit into the rotary
    table. Seen: 0.32. End: when a processor gets the sampling parameters.

    ``Scheduler._try_schedule_encoder_inputs``. Why: it bounds the encoder's work in a step by the
    embeddings that stay, so that a step could encode hundreds of pruned images. Seen: 0.32. End:
    when an item says what its encoding costs.

    ``CPUModelRunner.load_model``. Why: it is written anew for the CPU and leaves out the question
    whether the model prunes, so that positions stay in the embeddings' last channels (with
    ``--video-pruning-rate`` as well). Seen: 0.32. End: when it asks as its base class does.
    """
    from vllm.config import ModelConfig, MultiModalConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

    _wrap(EngineArgs, "create_engine_config", _create_engine_config)
    _wrap(Executor, "reset_encoder_cache", _reset_encoder_cache)
    _wrap(MultiModalConfig, "is_multimodal_pruning_enabled", _is_pruning_enabled)
    _wrap_property(ModelConfig, "uses_mrope", _uses_mrope)
    _wrap_property(ModelConfig, "mrope_num_dims", _mrope_num_dims)
    _wrap(InputProcessor, "process_inputs", _process_inputs)
    _wrap(GPUModelRunner, "_calc_mrope_positions", _calc_mrope_positions)
    _wrap(CPUModelRunner, "load_model", _load_model_on_cpu)
    _wrap(Scheduler, "_try_schedule_encoder_inputs", schedule_whole_items)
    WorkerBase.flashvlm_statistics = _statistics  # type: ignore[attr-defined]
    WorkerBase.flashvlm_selection_failures = _selection_failures  # type: ignore[attr-defined]
    WorkerBase.flashvlm_forget_images = _forget_images  # type: ignore[attr-defined]
    WorkerBase.flashvlm_watch = _watch  # type: ignore[attr-defined]
    WorkerBase.flashvlm_explanations = _explanations  # type: ignore[attr-defined]


def attach_to_serving() -> None:
    """Wrap what an API process needs.

    ``OnlineRenderer.preprocess_chat``. Why: it is where every chat-like endpoint turns a
    request into a prompt; request fields of a plugin have no other way to the processor
    (``mm_processor_kwargs`` are refused from untrusted clients, rightly). Seen: 0.32.
    End: when vLLM offers a request-to-processor hook.

    ``create_chat_completion`` and its siblings. Why: ``usage`` has no field for plugins, and
    ``vllm run-batch`` calls the handlers without any route. Seen: 0.32. End: when
    usage can be extended. There a request is also made again whose pixels were lost between vLLM's
    two caches of them, because another client left (``serving.resend``). Seen: 0.32, where it is
    answered with 500. End: when vLLM makes it again itself.
    """
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.renderers.online_renderer import OnlineRenderer

    _wrap(OnlineRenderer, "preprocess_chat", _preprocess_chat)
    _wrap(OpenAIServingChat, "create_chat_completion", _create_answer)
    _wrap(OpenAIServingChatBatch, "create_batch_chat_completion", _create_answer)
    _wrap(OpenAIServingResponses, "create_responses", _create_answer)


def _wrap(
    owner: type, name: str, wrapper: Any, *, static: bool = False, classmethod_: bool = False
) -> None:
    original = getattr(owner, name)
    plain = original.__func__ if classmethod_ else original
    if getattr(plain, _WRAPPED, False):
        return

    @functools.wraps(plain)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(plain, *args, **kwargs)

    setattr(wrapped, _WRAPPED, True)
    if static:
        setattr(owner, name, staticmethod(wrapped))
    else:
        setattr(owner, name, classmethod(wrapped) if classmethod_ else wrapped)


def _wrap_property(owner: type, name: str, wrapper: Any) -> None:
    original = getattr(owner, name).fget
    if getattr(original, _WRAPPED, False):
        return

    @functools.wraps(original)
    def wrapped(instance: Any) -> Any:
        return wrapper(original, instance)

    setattr(wrapped, _WRAPPED, True)
    setattr(owner, name, property(wrapped))


def _add_cli_args(original: Any, parser: Any, *, activate: Callable[[], None]) -> Any:
    import argparse

    class NamePlugins(argparse.Action):
        """Sets ``VLLM_PLUGINS``, which child processes inherit, and starts ours if named."""

        def __call__(self, _: Any, namespace: Any, value: Any, option: Any = None) -> None:
            from flashvlm_vllm.plugin import is_named

            names = [name.strip() for name in value.split(",") if name.strip()]
            if not names:
                raise argparse.ArgumentError(self, "name at least one plugin, such as flashvlm")
            setattr(namespace, self.dest, names)
            os.environ["VLLM_PLUGINS"] = ",".join(names)
            if is_named():
                activate()

    def budget(text: str) -> Any:
        try:
            return parse_budget_text(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    def requests(text: str) -> int:
        if not (text.isascii() and text.isdigit()):
            raise argparse.ArgumentTypeError(f"a whole number, 0 or more; got {text!r}")
        return int(text)

    parser = original(parser)
    group = parser.add_argument_group("flashvlm", "Visual token selection.")
    group.add_argument(
        "--plugins",
        action=NamePlugins,
        metavar="NAME[,NAME]",
        help="vLLM plugins to load, no others; the same as the variable VLLM_PLUGINS.",
    )
    group.add_argument(
        "--visual-budget",
        type=budget,
        metavar="TOKENS|FRACTION",
        help="Visual tokens to keep of each image where a request does not say: a whole number, "
        "or a fraction strictly between 0 and 1. Needs --plugins flashvlm.",
    )
    group.add_argument(
        "--visual-selector",
        metavar="NAME",
        help="How the tokens are chosen where a request does not say: flashvlm (the default), "
        "or another installed selector. Needs --plugins flashvlm.",
    )
    group.add_argument(
        "--visual-positions",
        choices=[str(each) for each in VisualPositions],
        help="Where kept tokens stand if a request does not say: at their places in the unpruned "
        "prompt (kept, the default), or one after another (closed). Needs --plugins flashvlm.",
    )
    group.add_argument(
        "--visual-feature-cache-gb",
        type=float,
        metavar="GIB",
        help="What the vision tower made of the latest images is held in each worker, up to so "
        f"many GiB (default: {DEFAULT_GB}), so that another question about an image does not run "
        "the tower again; and as much of preprocessed pixels in each API process. 0 turns both "
        "off. Needs --plugins flashvlm.",
    )
    group.add_argument(
        "--visual-playground",
        action="store_true",
        help="Serve a page at /flashvlm to try budgets in a browser: kept patches, answers, times. "
        "Needs --plugins flashvlm.",
    )
    group.add_argument(
        "--visual-explain-per-minute",
        type=requests,
        metavar="REQUESTS",
        help="How many requests a minute POST /v1/visual_tokens answers in each API process "
        "(default: 60); 0 turns it off. Needs --plugins flashvlm.",
    )
    return parser


def _from_cli_args(original: Any, cls: Any, args: Any) -> Any:
    from flashvlm_vllm.plugin import is_named

    given = {name: getattr(args, name, None) for name in SETTINGS}
    defaults = {name: value for name, value in given.items() if value is not None}
    if is_named():
        attach_to_serving()
        if defaults:
            # On the namespace, which vLLM also hands to the API servers that it spawns.
            args.mm_processor_kwargs = {**(args.mm_processor_kwargs or {}), **defaults}
    elif needless := [
        name
        for name in (*SETTINGS, *SERVING_SETTINGS)
        if getattr(args, name, None) not in (None, False)
    ]:
        flag = f"--{needless[0].replace('_', '-')}"
        sys.exit(f"flashvlm: {flag} does nothing without --plugins flashvlm")
    else:
        _tell_how_to_turn_on()
    engine_args = original(cls, args)
    setattr(engine_args, _FROM_COMMAND_LINE, True)
    return engine_args


def _validate(original: Any, command: Any, args: Any) -> None:
    # Before vLLM looks for the parts of a front end that this plugin refuses anyway.
    from flashvlm_vllm.plugin import is_named

    if is_named():
        _refuse_other_front_ends(args)
    original(command, args)


def _refuse_other_front_ends(args: Any) -> None:
    import vllm.envs as envs

    if getattr(args, "grpc", False):
        sys.exit(
            "flashvlm: --grpc requests do not pass through the chat endpoints, so no budget could "
            "reach the model; serve over HTTP, or leave out --plugins flashvlm"
        )
    if envs.VLLM_USE_RUST_FRONTEND:
        sys.exit(
            "flashvlm: the Rust front end does not run Python request code, so no budget could "
            "reach the model; unset VLLM_USE_RUST_FRONTEND, or leave out --plugins flashvlm"
        )


@functools.cache
def _tell_how_to_turn_on() -> None:
    from vllm.logger import init_logger

    # vLLM shows its own name space only.
    init_logger("vllm.flashvlm").info(
        "flashvlm is installed but not named: visual_budget fields are ignored. "
        "Turn it on with --plugins flashvlm (or VLLM_PLUGINS=flashvlm)."
    )


def _create_engine_config(original: Any, engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    config = _config_with_defaults(original, engine_args, *args, **kwargs)
    try:
        _refuse_adapters_on_towers(config)
    except ValueError as error:
        _stop(engine_args, error)
    _turn_off_encoder_graphs(config)
    _ask_for_positions(config.model_config)
    return config


def _config_with_defaults(original: Any, engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    given = engine_args.mm_processor_kwargs
    asked = {name: given[name] for name in SETTINGS if name in (given or {})}
    if not asked:
        return original(engine_args, *args, **kwargs)
    try:
        defaults = _checked_defaults(asked)
    except ValueError as error:
        _stop(engine_args, error)
    others = {key: value for key, value in given.items() if key not in asked}
    engine_args.mm_processor_kwargs = others or None
    try:
        config = original(engine_args, *args, **kwargs)
    finally:
        engine_args.mm_processor_kwargs = given
    if defaults:
        try:
            _set_defaults(config.model_config, defaults)
        except ValueError as error:
            _stop(engine_args, error)
    return config


def _refuse_adapters_on_towers(config: Any) -> None:
    """Refuse what would encode one request's image with another request's adapter.

    vLLM says once per step which rows of the tower's input belong to which adapter, and images
    with and without a budget are encoded in separate calls, each of which starts at the first
    row. Seen: 0.32. End: when each call is told its own rows.
    """
    from flashvlm_vllm.plugin import covers

    lora = config.lora_config
    if lora is not None and lora.enable_tower_connector_lora and covers(config.model_config):
        raise ValueError(
            "LoRA on the vision tower or projector (enable_tower_connector_lora) cannot be "
            "combined with visual budgets: images could be encoded with another request's "
            "adapter; leave that option out (adapters on the language model work), or leave out "
            "--plugins flashvlm"
        )


def _turn_off_encoder_graphs(config: Any) -> None:
    from flashvlm_vllm.plugin import covers

    settings = config.compilation_config
    if not (settings.cudagraph_mm_encoder or settings.compile_mm_encoder):
        return
    if covers(config.model_config):
        from vllm.logger import init_logger

        settings.cudagraph_mm_encoder = settings.compile_mm_encoder = False
        init_logger("vllm.flashvlm").info(
            "flashvlm: CUDA graphs and compilation of the vision encoder are off; they would "
            "bypass the selection"
        )


def _ask_for_positions(model_config: Any) -> None:
    from flashvlm_vllm.plugin import covers
    from flashvlm_vllm.schemes import axes_of

    if not covers(model_config) or position_axes(model_config):
        return
    axes = axes_of(model_config)
    set_position_axes(model_config, axes)
    if not axes and default_positions(model_config) is VisualPositions.KEPT:
        from vllm.logger import init_logger

        init_logger("vllm.flashvlm").warning(
            "flashvlm: %s has a position scheme that is not known (rotary embeddings are); the "
            "places of kept tokens close up",
            model_config.architecture,
        )


def _is_pruning_enabled(original: Any, multimodal_config: Any) -> bool:
    return bool(axes_on(multimodal_config)) or original(multimodal_config)


def _uses_mrope(original: Any, model_config: Any) -> bool:
    return bool(position_axes(model_config)) or original(model_config)


def _mrope_num_dims(original: Any, model_config: Any) -> int:
    from flashvlm_vllm.schemes import LINE_CHANNELS

    dims: int = original(model_config)
    return LINE_CHANNELS if position_axes(model_config) == 1 else dims


def _calc_mrope_positions(original: Any, runner: Any, scheduler_output: Any) -> None:
    batch = runner.input_batch
    count = len(batch.req_ids)
    one_each = scheduler_output.total_num_scheduled_tokens == count
    if one_each and position_axes(runner.model_config) == 1:
        requests = [runner.requests[name] for name in batch.req_ids]
        ids = [each.prompt_token_ids for each in requests]
        if None not in ids:
            computed = batch.num_computed_tokens_cpu[:count]
            if (computed >= [len(each) for each in ids]).all():
                ahead = [each.mrope_position_delta for each in requests]
                runner.mrope_positions.np[:, :count] = computed + ahead
                return
    original(runner, scheduler_output)


def _process_inputs(
    original: Any, processor: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any
) -> Any:
    from flashvlm_vllm.fitting import fit

    request = original(processor, request_id, prompt, *args, **kwargs)
    fit(request, processor.model_config, prompt)
    return request


def _load_model_on_cpu(original: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    original(runner, *args, **kwargs)
    config = runner.model_config.multimodal_config
    runner.is_multimodal_pruning_enabled = (
        config is not None
        and config.is_multimodal_pruning_enabled()
        and getattr(runner.get_model(), "supports_multimodal_pruning", False)
    )


def _checked_defaults(asked: dict[str, Any]) -> dict[str, Any]:
    """Return what is set of the defaults asked for."""
    from flashvlm_vllm.selection.registry import find_selector
    from flashvlm_vllm.selector import parse_selector

    selector = parse_selector(asked.get(SELECTOR))
    if selector is not None:
        find_selector(selector)
    defaults = {
        BUDGET: parse_budget(asked.get(BUDGET)),
        SELECTOR: selector,
        VISUAL_POSITIONS: parse_positions(asked.get(VISUAL_POSITIONS)),
        FEATURE_CACHE_GB: parse_feature_cache_gb(asked.get(FEATURE_CACHE_GB)),
    }
    return {name: value for name, value in defaults.items() if value is not None}


def _stop(engine_args: Any, error: ValueError) -> NoReturn:
    """End a server with one line, a program that uses ``LLM`` with the exception."""
    if getattr(engine_args, _FROM_COMMAND_LINE, False):
        sys.exit(f"flashvlm: {error}")
    raise error


def _set_defaults(model_config: Any, defaults: dict[str, Any]) -> None:
    from flashvlm_vllm.plugin import MODELS, covers

    if not covers(model_config):
        raise ValueError(
            f"a server-wide {' or '.join(defaults)} needs a model that is covered "
            f"({', '.join(sorted(MODELS))}); {model_config.model} is {model_config.architecture}"
        )
    for name, value in defaults.items():
        setattr(model_config.multimodal_config, name, value)


async def _preprocess_chat(
    original: Any, renderer: Any, request: Any, messages: Any, *args: Any, **kwargs: Any
) -> Any:
    from flashvlm_vllm.serving.rendering import render_with_budget

    trusting = copy.copy(renderer)
    trusting.trust_request_mm_kwargs = True
    return await render_with_budget(
        original, renderer, trusting, request, messages, *args, **kwargs
    )


async def _create_answer(
    original: Any, handler: Any, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any
) -> Any:
    from flashvlm_vllm.serving import outcome, report, request_log, resend

    async def make() -> Any:
        return await original(handler, request, raw_request, *args, **kwargs)

    async def again() -> Any:
        with report.unnoticed():
            return await make()

    with report.collecting() as collected:
        try:
            answer = await resend.answered(make, again, lambda: bool(collected.counts))
            answer = await outcome.checked(answer, collected.unproven, handler)
        finally:
            request_log.tell(request, raw_request, collected)
    return report.annotated(answer, collected)


def _reset_encoder_cache(original: Any, executor: Any) -> None:
    original(executor)
    executor.collective_rpc("flashvlm_forget_images")


def _forget_images(worker: Any) -> None:
    forget = getattr(worker.get_model(), "forget_images", None)
    if forget is not None:
        forget()


def _statistics(worker: Any) -> dict[str, dict[str, Any]]:
    from flashvlm_vllm.timing import SELECTION_CLOCK

    cache = getattr(worker.get_model(), "feature_cache", None)
    return {
        "selection": SELECTION_CLOCK.read(),
        "feature_cache": {} if cache is None else cache.read(),
    }


def _selection_failures(worker: Any, identities: list[str]) -> dict[str, str]:
    from flashvlm_vllm.failures import SELECTION_FAILURES

    return SELECTION_FAILURES.among(identities)


def _watch(_: Any, name: str, identities: list[str], query_ids: list[int]) -> None:
    from flashvlm_vllm.explanations import EXPLANATIONS

    EXPLANATIONS.watch(name, identities, query_ids)


def _explanations(_: Any, name: str) -> dict[str, Any]:
    from flashvlm_vllm.explanations import EXPLANATIONS

    return EXPLANATIONS.take(name)
