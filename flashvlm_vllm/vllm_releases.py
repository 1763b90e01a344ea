# SPDX-License-Identifier: Apache-2.0
"""Which releases of vLLM this plugin is made for, and what it does on another one.

An older release lacks hooks that the plugin stands on: there it refuses, before a model is
loaded. A newer one may well work: there it says so and goes on.
"""

import functools
import multiprocessing
import os
import re
from collections.abc import Mapping
from typing import Any

LOWEST = (0, 31)
HIGHEST = (0, 33)
"""The window, both ends included; patch releases count as their minor release."""

ANYWAY = "FLASHVLM_ANY_VLLM"
"""Environment variable: with ``1`` an older release is a warning as well."""


class UnsupportedVLLMError(RuntimeError):
    """The installed vLLM is older than the window."""


def window() -> str:
    """Return the window as people write it, such as ``0.31 to 0.33``."""
    return f"{'.'.join(map(str, LOWEST))} to {'.'.join(map(str, HIGHEST))}"


def is_tested(version: str) -> bool:
    """Tell whether a release of vLLM lies in the window."""
    release = release_of(version)
    return release is not None and LOWEST <= release <= HIGHEST


def check_vllm(version: str | None = None) -> None:
    """Warn once about a vLLM newer than the window; refuse an older one.

    Args:
        version: as ``vllm.__version__`` says; read from the installed vLLM when left out.

    Raises:
        UnsupportedVLLMError: the release is older, and ``FLASHVLM_ANY_VLLM`` is not 1.

    """
    if version is None:
        from vllm import __version__ as installed

        version = installed
    if is_tested(version):
        return
    release = release_of(version)
    if release is not None and release < LOWEST and os.environ.get(ANYWAY) != "1":
        raise UnsupportedVLLMError(
            f"vLLM {version} is older than this plugin is made for ({window()}); install one of "
            f"those, or set {ANYWAY}=1 to go on at your own risk"
        )
    _tell(version)


def release_of(version: str) -> tuple[int, int] | None:
    """Return major and minor; ``None`` for a build that has no number, such as ``dev``."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None


@functools.cache
def _tell(version: str) -> None:
    # The engine's and the workers' processes have the same vLLM: one line is enough.
    if multiprocessing.parent_process() is not None:
        return
    from vllm.logger import init_logger

    # vLLM shows its own name space only.
    init_logger("vllm.flashvlm").warning(
        "flashvlm: vLLM %s is not among the releases this plugin is tested with (%s); going on",
        version,
        window(),
    )


def remove_route(app: Any, route: Any) -> None:
    """Take a route of vLLM's from an application, so that one added in its place answers.

    Why: 0.32 does so itself with the routes that an endpoint plugin adds again; before, the one
    that was there first answers. Seen: 0.31. End: when 0.32 is the lowest release.

    Args:
        app: the FastAPI application.
        route: one of ``app.routes``.

    """
    app.router.routes.remove(route)


def ends_without_output(event: object) -> bool:
    """Return whether this event ends a stream that has produced no token.

    Why: vLLM takes a request that fails in the engine before its first token for a chunked
    prefill, and its stream ends without an error. Seen: 0.31. End: when 0.32, which sends an
    error, is the lowest release.

    Args:
        event: of a streamed chat completion, the first after the one with the role.

    """
    import vllm

    if release_of(vllm.__version__) != (0, 31) or not isinstance(event, str):
        return False
    return event.startswith("data: [DONE]") or '"choices":[]' in event


def video_arguments(info: Any, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the Hugging Face video processor is told, by the engine and by a request.

    Why: the method that sorts arguments by modality came with 0.32; before, the context lays those
    of one modality over the others. Seen: 0.31. End: when 0.32 is the lowest release.

    Args:
        info: vLLM's processing info of a model.
        arguments: the request's ``mm_processor_kwargs``.

    """
    resolve = getattr(info, "_merge_and_resolve_mm_processor_kwargs", None)
    if resolve is None:
        merged: Mapping[str, Any] = info.ctx.get_merged_mm_kwargs(arguments, modality="video")
        return merged
    scoped: Mapping[str, Any] = resolve(arguments).get("videos_kwargs", {})
    return scoped
