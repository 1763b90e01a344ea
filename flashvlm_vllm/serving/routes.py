# SPDX-License-Identifier: Apache-2.0
"""Routes of vLLM on which visual fields would have no effect, and which refuse them.

``docs/users/request.md`` lists all routes that take chats or pictures.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from fastapi import Request

from flashvlm_vllm.request.header import BUDGET_HEADER
from flashvlm_vllm.request.refusal import Reason, Refusal
from flashvlm_vllm.serving import metrics, request_log
from flashvlm_vllm.serving.request_models import VisualFields
from flashvlm_vllm.serving.sent_request import has_header

Refuse = Callable[[Request], Awaitable[None]]
"""A dependency of a route; raises a refusal."""

MESSAGES: Final = ("/v1/messages", "/v1/messages/count_tokens", "/v1/messages/render")
_HEADER_ONLY: Final = ("/cohere/v2/chat", "/cohere/v2/chat/render")
_WITHOUT_PICTURES: Final = ("/v1/systemone",)
"""With the models that this plugin covers."""
_RENDERED: Final = ("/inference/v1/generate",)
_POOLING: Final = (
    *("/pooling", "/classify", "/v1/embeddings", "/v2/embed"),
    *("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
)
_INVOCATIONS: Final = "/invocations"


def refusals_of(path: str, *, generates: bool) -> Sequence[Refuse]:
    """Return what a route refuses.

    Args:
        path: the route's path.
        generates: whether the server generates text. Others have the route ``/invocations`` too,
            for embeddings.

    """
    if path in MESSAGES:
        return [_refuse_unread]
    if path in _HEADER_ONLY:
        return [_refuse_fields(f"send the header {BUDGET_HEADER}")]
    if path in _WITHOUT_PICTURES:
        return [_refuse_fields("it takes no pictures for the models that this plugin covers")]
    if path in _RENDERED:
        # The header is ignored: a proxy may have sent it to the route that rendered the prompt.
        return [_refuse_fields("send it to the route that renders its prompt")]
    if path in _POOLING or (path == _INVOCATIONS and not generates):
        there = "only the server's default (--visual-budget) applies there"
        return [_refuse_fields(there), _refuse_header(there)]
    return []


def _refuse_fields(instead: str) -> Refuse:
    async def refuse(raw_request: Request) -> None:
        body = await raw_request.json()
        if not isinstance(body, Mapping):
            return
        holders = (("", body), ("metadata.", body.get("metadata")))
        blocks = ((f"{path}.", block) for path, block in _blocks(body, "messages", ""))
        for prefix, fields in (*holders, *blocks):
            for name in _visual_fields(fields):
                raise _refusal(raw_request, f"{prefix}{name}", instead)

    return refuse


def _refuse_header(instead: str) -> Refuse:
    async def refuse(raw_request: Request) -> None:
        if has_header():
            raise _refusal(raw_request, BUDGET_HEADER, instead)

    return refuse


async def _refuse_unread(raw_request: Request) -> None:
    """Refuse a visual field where vLLM's model of the request would drop it.

    In a content block, or in an ``extra_body`` that a client has not unpacked (LiteLLM's for
    Anthropic).
    """
    body = await raw_request.json()
    extra = body.get("extra_body") if isinstance(body, Mapping) else None
    for path, holder in (("extra_body", extra), *_blocks(body, "messages", "")):
        for name in _visual_fields(holder):
            raise _refusal(raw_request, f"{path}.{name}", f"set {name} in the request itself")


def _blocks(holder: Any, key: str, path: str, levels: int = 3) -> Iterator[tuple[str, Any]]:
    """Yield messages, their content blocks, and those in tool results, with their paths."""
    blocks = holder.get(key) if isinstance(holder, Mapping) else None
    for number, block in enumerate(blocks if isinstance(blocks, list) else ()):
        own = f"{path}{key}.{number}"
        yield own, block
        if levels > 1:
            yield from _blocks(block, "content", f"{own}.", levels - 1)


def _visual_fields(fields: Any) -> list[str]:
    return [
        name for name in VisualFields.model_fields if isinstance(fields, Mapping) and name in fields
    ]


def _refusal(raw_request: Request, name: str, instead: str) -> Refusal:
    metrics.count_refusal(Reason.WRONG_ROUTE)
    request_log.log_refused(Reason.WRONG_ROUTE)
    path = raw_request.scope["route"].path
    return Refusal(
        Reason.WRONG_ROUTE, f"{name}: it has no effect on {path}; {instead}", parameter=name
    )
