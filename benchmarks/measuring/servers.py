# SPDX-License-Identifier: Apache-2.0
"""Servers that are up at once and are measured in turn, with the plugin and without."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.idle.run import NO_PLUGINS, QUIET
from benchmarks.measuring.ask import ask, user
from demo.photo import data_url, photo
from demo.server import Server

MODEL_NAME: Final = "llava"
PLUGIN: Final = ("--plugins", "flashvlm")


class WrongStateError(RuntimeError):
    """A server has the plugin that should not, or the other way round."""


def server(model: Path, *, plugin: bool, log: Path, arguments: Sequence[str] = ()) -> Server:
    """Describe a server of ``model``; without the plugin it is stock vLLM."""
    return Server(
        model,
        ["--served-model-name", MODEL_NAME, *(PLUGIN if plugin else ()), *arguments],
        log=log,
        environment=QUIET if plugin else {**QUIET, **NO_PLUGINS},
    )


def confirm(url: str, *, plugin: bool) -> None:
    """Stop the benchmark when a server is not in the state that it is measured for."""
    reply = ask(url, MODEL_NAME, [user("What is this?", data_url(photo()))], tokens=1)
    if (reply.visual_tokens is not None) != plugin:
        raise WrongStateError(f"plugin at work: {not plugin}, where it should be {plugin}")
