# SPDX-License-Identifier: Apache-2.0
"""One log line per request, at debug level: settings, token counts and times.

A line contains only numbers and names that the server defines. It never contains the user's words,
images, URLs or file names, nor error messages that may quote them.
"""

import json
import logging
from typing import Any

from vllm.logger import init_logger

from flashvlm_vllm.ipc.prompt_report import shown_kinds
from flashvlm_vllm.request.refusal import Reason
from flashvlm_vllm.request.request_budget import as_json
from flashvlm_vllm.serving.request_context import Collected

logger = init_logger("vllm.flashvlm")  # vLLM configures only its own loggers

PREFIX = "flashvlm request "
"""Prefix before the JSON."""


def log_request(request: Any, raw_request: Any, collected: Collected) -> None:
    """Log a request that had images or videos, or was refused.

    For a streaming request the line is written before the first event.

    Args:
        request: vLLM's request model.
        raw_request: the HTTP request; ``None`` in ``vllm run-batch``.
        collected: data recorded for the request.

    """
    if not logger.isEnabledFor(logging.DEBUG):
        return
    if collected.counts or collected.refused is not None:
        _log(_request_id(request, raw_request), collected)


def log_refused(reason: Reason) -> None:
    """Log a request that was refused before it was assigned an id."""
    if logger.isEnabledFor(logging.DEBUG):
        _log(None, Collected(refused=reason))


def _log(request_id: str | None, collected: Collected) -> None:
    latest = collected.latest
    counts = collected.counts
    fields = {
        "request_id": request_id,
        "model": collected.model,
        **{
            f"{kind}s": sum(count.modality == kind for count in counts)
            for kind in shown_kinds(counts, "image", "video")
        },
        "total": sum(count.total for count in counts),
        "kept": sum(count.kept for count in counts),
        "budget": None if latest is None else as_json(latest.budget),
        "is_default": latest is not None and latest.is_default,
        "selector": None if latest is None else latest.selector,
        "rendering_ms": round(collected.seconds * 1000, 1),
        "refused": collected.refused,
    }
    logger.debug("%s%s", PREFIX, json.dumps(fields))


def _request_id(request: Any, raw_request: Any) -> str | None:
    """Return the id of the response; for a refused request the id given by the client, if any."""
    if raw_request is not None:
        metadata = getattr(raw_request.state, "request_metadata", None)
        if metadata is not None:
            return str(metadata.request_id)
        given = raw_request.headers.get("X-Request-Id")
        if given is not None:
            return str(given)
    own = getattr(request, "request_id", None)
    return None if own is None else str(own)
