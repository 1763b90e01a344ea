# SPDX-License-Identifier: Apache-2.0
"""The supported releases of vLLM, and what differs between them.

An older release lacks hooks that the plugin needs; the plugin refuses to start, before a model is
loaded. On a newer release the plugin logs a warning and starts.
"""

import functools
import multiprocessing
import os
import re
from collections.abc import Mapping
from typing import Any

LOWEST = (0, 31)
HIGHEST = (0, 33)
"""Range of supported releases, both ends included. Patch releases count as their minor release."""

ANYWAY = "FLASHVLM_ANY_VLLM"
"""Environment variable: if ``1``, an older release is a warning too, not an error."""


class UnsupportedVLLMError(RuntimeError):
    """The installed vLLM is older than the supported releases."""


def window() -> str:
    """Return the range of supported releases as text, such as ``0.31 to 0.33``."""
    return f"{'.'.join(map(str, LOWEST))} to {'.'.join(map(str, HIGHEST))}"


def is_tested(version: str) -> bool:
    """Return whether a vLLM version is in the range of supported releases."""
    release = release_of(version)
    return release is not None and LOWEST <= release <= HIGHEST


def check_vllm(version: str | None = None) -> None:
    """Warn once about a vLLM that is newer than the supported releases; refuse an older one.

    Args:
        version: in the form of ``vllm.__version__``; by default the installed version.

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
            f"vLLM {version} is older than the releases this plugin supports ({window()}); install "
            f"one of those, or set {ANYWAY}=1 to start without support"
        )
    _tell(version)


def release_of(version: str) -> tuple[int, int] | None:
    """Return the major and minor version; ``None`` if a build has no number, such as ``dev``."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None


@functools.cache
def _tell(version: str) -> None:
    # The processes of the engine and its workers have the same vLLM: one warning is enough.
    if multiprocessing.parent_process() is not None:
        return
    from vllm.logger import init_logger

    # vLLM configures only its own loggers
    init_logger("vllm.flashvlm").warning(
        "flashvlm: vLLM %s is not among the releases this plugin is tested with (%s); the plugin "
        "is loaded all the same",
        version,
        window(),
    )


def remove_route(app: Any, route: Any) -> None:
    """Remove one of vLLM's routes from an application, so that its replacement is used.

    Why: 0.32 itself removes a route that an endpoint plugin replaces; in 0.31 the route that was
    added first is used. Seen: 0.31. End: when 0.32 is the lowest release.

    Args:
        app: the FastAPI application.
        route: one of ``app.routes``.

    """
    app.router.routes.remove(route)


def ends_without_output(event: object) -> bool:
    """Return whether this event ends a stream that has produced no token.

    Why: vLLM handles a request that fails in the engine before its first token like a chunked
    prefill, so its stream ends without an error. Seen: 0.31. End: when 0.32, which sends an error,
    is the lowest release.

    Args:
        event: the event of a streamed chat completion that follows the one with the role.

    """
    import vllm

    if release_of(vllm.__version__) != (0, 31) or not isinstance(event, str):
        return False
    return event.startswith("data: [DONE]") or '"choices":[]' in event


def converts_chunks(handler: Any) -> bool:
    """Return whether vLLM converts chunks, not events, for Anthropic's and Cohere's routes.

    Why: since 0.33, ``create_chat_completion`` returns a stream that is converted already; in 0.32
    vLLM converts the events that it returns. Seen: 0.32. End: when 0.33 is the lowest release.

    Args:
        handler: vLLM's handler of a chat endpoint.

    """
    return hasattr(handler, "chat_completion_stream_generator_raw")


def video_arguments(info: Any, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments of the Hugging Face video processor, from the engine and a request.

    Why: the method that sorts arguments by modality was added in 0.32; in 0.31 the arguments of one
    modality are merged into those of the others. Seen: 0.31. End: when 0.32 is the lowest release.

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
