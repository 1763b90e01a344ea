# SPDX-License-Identifier: Apache-2.0
"""Adds ``--plugins`` and this plugin's flags to ``vllm serve`` and ``vllm run-batch``."""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from flashvlm_vllm.request.budget import parse_budget_text
from flashvlm_vllm.request.load_levels import parse_load_level
from flashvlm_vllm.request.request_budget import as_json, parse_request_budget_text
from flashvlm_vllm.request.steering import Steering
from flashvlm_vllm.request.visual_positions import VisualPositions
from flashvlm_vllm.settings import (
    BUDGET_MAX,
    BUDGET_MIN,
    DEFAULT_GB,
    ENGINE_SETTINGS,
    SERVING_SETTINGS,
    UNDER_LOAD,
    is_enabled,
)
from flashvlm_vllm.vllm_compat import attach
from flashvlm_vllm.vllm_compat.engine_config import FROM_COMMAND_LINE
from flashvlm_vllm.vllm_compat.wrap import Kind, Wrap, apply_all


def wraps(activate: Callable[[], None]) -> tuple[Wrap, ...]:
    """Return the wraps of the command line.

    Args:
        activate: starts the plugin; called when ``--plugins`` names it.

    """
    return (
        Wrap(
            "vllm.engine.arg_utils:EngineArgs.add_cli_args",
            "vLLM selects plugins by the variable VLLM_PLUGINS only, and plugins cannot add flags.",
            "0.32",
            "vLLM has --plugins and a hook for flags.",
            wrapper=functools.partial(_add_cli_args, activate=activate),
            kind=Kind.STATIC,
        ),
        Wrap(
            "vllm.engine.arg_utils:EngineArgs.from_cli_args",
            "The values of a plugin's flags must be passed to the engine and to the API servers "
            "that vLLM spawns.",
            "0.32",
            "vLLM has a hook for flags.",
            wrapper=_from_cli_args,
            kind=Kind.CLASS,
        ),
        Wrap(
            "vllm.entrypoints.cli.serve:ServeSubcommand.validate",
            "--grpc and the Rust front end bypass the chat endpoints, so a budget would have no "
            "effect; they are refused before vLLM imports them.",
            "0.32",
            "Those front ends support plugins.",
            wrapper=_validate,
            # Needed only in the process that parses a command line, which has imported it by now.
            only_if_imported=True,
        ),
    )


def add_flags(activate: Callable[[], None]) -> None:
    """Add the flags.

    Args:
        activate: starts the plugin; called when ``--plugins`` names it.

    """
    apply_all(wraps(activate))


def is_command_line() -> bool:
    """Return whether this process parses a ``vllm`` command line."""
    return "vllm.entrypoints.cli.serve" in sys.modules


def _add_cli_args(original: Any, parser: Any, *, activate: Callable[[], None]) -> Any:
    class NamePlugins(argparse.Action):
        """Sets ``VLLM_PLUGINS``, which child processes inherit; starts this plugin if named."""

        def __call__(self, _: Any, namespace: Any, value: Any, option: Any = None) -> None:

            names = [name.strip() for name in value.split(",") if name.strip()]
            if not names:
                raise argparse.ArgumentError(self, "name at least one plugin, such as flashvlm")
            setattr(namespace, self.dest, names)
            os.environ["VLLM_PLUGINS"] = ",".join(names)
            if is_enabled():
                activate()

    def checked(parse: Callable[[object], Any]) -> Callable[[str], Any]:
        def read(text: str) -> Any:
            try:
                return parse(text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        return read

    def load_level(text: object) -> object:
        parse_load_level(text)
        return text  # Parsed again where the engine's settings are made.

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
        help="vLLM plugins to load; others are not loaded. Sets the variable VLLM_PLUGINS.",
    )
    group.add_argument(
        "--visual-budget",
        type=checked(lambda text: as_json(parse_request_budget_text(text))),
        metavar="TOKENS|FRACTION",
        help="Default number of visual tokens to keep of each image, for requests without a "
        "budget: a whole number, or a fraction strictly between 0 and 1; fit, for as many as the "
        "context has room for; or '{\"total\": TOKENS}' for all images of a request. Needs "
        "--plugins flashvlm.",
    )
    for name, least_or_most in ((BUDGET_MIN, "least"), (BUDGET_MAX, "most")):
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=checked(parse_budget_text),
            metavar="TOKENS|FRACTION",
            help=f"The {least_or_most} visual tokens of each image that a request can ask for; "
            "usage reports where it applied. Needs --plugins flashvlm.",
        )
    group.add_argument(
        "--visual-budget-under-load",
        type=checked(load_level),
        action="append",
        metavar="BUDGET:WAITING",
        help="Budget of requests that name none, while more than WAITING requests wait in the "
        "engines; may be given several times. Needs --plugins flashvlm.",
    )
    group.add_argument(
        "--visual-selector",
        metavar="NAME",
        help="Default selector, for requests that do not name one: flashvlm (the default), or "
        "another installed selector. Needs --plugins flashvlm.",
    )
    group.add_argument(
        "--visual-positions",
        choices=[str(each) for each in VisualPositions],
        help="Default positions of kept tokens, for requests that do not set them: as in the "
        "unpruned prompt (kept, the default), or consecutive (closed). Needs --plugins flashvlm.",
    )
    group.add_argument(
        "--visual-steering",
        choices=[str(each) for each in Steering],
        help="Words that guide the selection of a picture in a conversation, for requests without "
        "visual_steering: those of the message that brought it (message, the default), of the "
        "latest user message (latest), or of its own message for the newest pictures too (own). "
        "Needs --plugins flashvlm.",
    )
    group.add_argument(
        "--visual-feature-cache-gb",
        type=float,
        metavar="GIB",
        help="Size in GiB of the cache of visual features in each worker "
        f"(default: {DEFAULT_GB}), with which another question about an image does not run the "
        "vision tower again; also the size of the cache of preprocessed pixels in each API "
        "process. 0 turns both off. Needs --plugins flashvlm.",
    )
    group.add_argument(
        "--visual-playground",
        action="store_true",
        help="Serve a page at /flashvlm to try budgets in a browser. It shows kept patches, "
        "answers and times. Needs --plugins flashvlm.",
    )
    group.add_argument(
        "--visual-explain-per-minute",
        type=requests,
        metavar="REQUESTS",
        help="Most requests per minute to POST /v1/visual_tokens in each API process "
        "(default: 60); 0 turns the route off. Needs --plugins flashvlm.",
    )
    return parser


def _from_cli_args(original: Any, cls: Any, args: Any) -> Any:
    given = {name: getattr(args, name, None) for name in ENGINE_SETTINGS}
    defaults = {name: value for name, value in given.items() if value is not None}
    if is_enabled():
        attach.to_serving()
        if UNDER_LOAD in defaults and getattr(args, "disable_log_stats", False):
            sys.exit(
                "flashvlm: --visual-budget-under-load needs the engine's statistics; leave out "
                "--disable-log-stats"
            )
        if defaults:
            # Set on the namespace, which vLLM also passes to the API servers that it spawns.
            args.mm_processor_kwargs = {**(args.mm_processor_kwargs or {}), **defaults}
    elif needless := [
        name
        for name in (*ENGINE_SETTINGS, *SERVING_SETTINGS)
        if getattr(args, name, None) not in (None, False)
    ]:
        flag = f"--{needless[0].replace('_', '-')}"
        sys.exit(f"flashvlm: {flag} has no effect without --plugins flashvlm")
    else:
        _log_how_to_enable()
    engine_args = original(cls, args)
    setattr(engine_args, FROM_COMMAND_LINE, True)
    return engine_args


def _validate(original: Any, command: Any, args: Any) -> None:
    # Before vLLM imports a front end that this plugin refuses.
    if is_enabled():
        _refuse_other_front_ends(args)
    original(command, args)


def _refuse_other_front_ends(args: Any) -> None:
    import vllm.envs as envs

    if getattr(args, "grpc", False):
        sys.exit(
            "flashvlm: --grpc requests do not pass through the chat endpoints, so budgets would "
            "have no effect; serve over HTTP, or leave out --plugins flashvlm"
        )
    if envs.VLLM_USE_RUST_FRONTEND:
        sys.exit(
            "flashvlm: the Rust front end does not run Python request code, so budgets would have "
            "no effect; unset VLLM_USE_RUST_FRONTEND, or leave out --plugins flashvlm"
        )


@functools.cache
def _log_how_to_enable() -> None:
    from vllm.logger import init_logger

    # vLLM configures only its own loggers
    init_logger("vllm.flashvlm").info(
        "flashvlm is installed but not enabled: visual_budget fields are ignored. "
        "Enable it with --plugins flashvlm (or VLLM_PLUGINS=flashvlm)."
    )
