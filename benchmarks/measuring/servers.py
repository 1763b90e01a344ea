# SPDX-License-Identifier: Apache-2.0
"""Servers with and without the plugin, which run at the same time and are measured in turn."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from benchmarks.measuring.ask import ask, user
from benchmarks.measuring.report import say
from testing.photo import data_url, photo
from testing.server import Server

MODEL_NAME: Final = "llava"
PLUGIN: Final = ("--plugins", "flashvlm")
# No network access while something is measured.
QUIET: Final = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
# An empty list of plugins: vLLM loads none, as if nothing were installed.
NO_PLUGINS: Final = {"VLLM_PLUGINS": ""}


class WrongStateError(RuntimeError):
    """A server runs the plugin where it should not, or does not run it where it should."""


def server(
    model: Path,
    *,
    plugin: bool,
    log: Path,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Server:
    """Describe a server of ``model``; without the plugin it is stock vLLM."""
    return Server(
        model,
        ["--served-model-name", MODEL_NAME, *(PLUGIN if plugin else ()), *arguments],
        log=log,
        environment={**QUIET, **({} if plugin else NO_PLUGINS), **(environment or {})},
    )


def confirm(url: str, *, plugin: bool) -> None:
    """Stop the benchmark unless a server runs the plugin, or does not, as it should.

    Raises:
        WrongStateError: it does not.
    """
    if is_enabled(url) != plugin:
        raise WrongStateError(f"plugin enabled: {not plugin}, where it should be {plugin}")


def start(stack: ExitStack, name: str, described: Server, *, plugin: bool) -> Server:
    """Start a server and check it; the stack stops it."""
    say(f"starting: {name}")
    running = stack.enter_context(described)
    confirm(running.url, plugin=plugin)
    return running


@contextmanager
def stock_and_plugin(
    model: Path, folder: Path, arguments: Sequence[str], prefix: str = ""
) -> Iterator[dict[bool, Server]]:
    """Run stock vLLM (False) and a server with the plugin (True) during the block.

    Args:
        model: its folder.
        folder: for the two logs.
        arguments: of both servers.
        prefix: of the names of the logs.

    """
    with ExitStack() as stack:
        running = {}
        for plugin in (False, True):
            name = "plugin" if plugin else "stock"
            log = folder / f"{prefix}{name}.log"
            described = server(model, plugin=plugin, log=log, arguments=arguments)
            running[plugin] = start(stack, name, described, plugin=plugin)
        yield running


def is_enabled(url: str) -> bool:
    """Return whether a server reports visual tokens, which only the plugin does."""
    reply = ask(url, MODEL_NAME, [user("What is this?", data_url(photo()))], tokens=1)
    return reply.visual_tokens is not None
