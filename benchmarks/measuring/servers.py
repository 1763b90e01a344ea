# SPDX-License-Identifier: Apache-2.0
"""Servers that are up at once and are measured in turn, with the plugin and without."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from benchmarks.measuring.ask import ask, user
from testing.photo import data_url, photo
from testing.server import Server

MODEL_NAME: Final = "llava"
PLUGIN: Final = ("--plugins", "flashvlm")
# Nothing is looked up or reported elsewhere while something is measured.
QUIET: Final = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
# An empty list of plugins: vLLM loads none, as if nothing were installed.
NO_PLUGINS: Final = {"VLLM_PLUGINS": ""}


class WrongStateError(RuntimeError):
    """A server has the plugin that should not, or the other way round."""


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
    """Stop the benchmark when a server is not in the state that it is measured for."""
    if is_at_work(url) != plugin:
        raise WrongStateError(f"plugin at work: {not plugin}, where it should be {plugin}")


def is_at_work(url: str) -> bool:
    """Tell whether a server's plugin counts visual tokens."""
    reply = ask(url, MODEL_NAME, [user("What is this?", data_url(photo()))], tokens=1)
    return reply.visual_tokens is not None
