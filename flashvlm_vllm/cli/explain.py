# SPDX-License-Identifier: Apache-2.0
"""``flashvlm explain``: shows which tokens a running server keeps for a request, and why."""

import argparse
import base64
import json
import mimetypes
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flashvlm_vllm.request.budget import BUDGET
from flashvlm_vllm.request.question import QUERY
from flashvlm_vllm.request.request_budget import as_json, parse_request_budget_text
from flashvlm_vllm.request.selector_name import SELECTOR

_SECONDS = 600
_SHOWN_COLUMNS = 64


class ExplainError(Exception):
    """A request to the server or access to a file failed; the message says why."""


def add_command(commands: Any) -> None:
    """Add ``flashvlm explain`` to the command's parsers."""
    parser = commands.add_parser(
        "explain",
        help="show which tokens of an image or a video a running server keeps, and why",
        description="Show which tokens of images and videos a server keeps for a question: the "
        "kept patches, how well they cover the dropped ones, and the token counts of other "
        "budgets. The server runs and counts it like any other request.",
    )
    parser.add_argument("question", help="the user's words")
    parser.add_argument(
        "--url", default="http://localhost:8000", help="the server (default: %(default)s)"
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("OPENAI_API_KEY"),
        help="the server's API key (default: the variable OPENAI_API_KEY)",
    )
    parser.add_argument("--model", help="a served model (default: the first one)")
    for kind in ("image", "video"):
        parser.add_argument(
            f"--{kind}",
            action="append",
            default=[],
            metavar="FILE|URL",
            help="may be given several times; the server downloads a URL",
        )
    parser.add_argument(
        "--budget",
        type=_budget,
        metavar="TOKENS|FRACTION",
        help="as in a request (default: the server's)",
    )
    parser.add_argument("--selector", metavar="NAME", help="a selector (default: the server's)")
    parser.add_argument(
        "--query", metavar="WORDS", help="words that guide the selection in place of the question"
    )
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="write a drawing of the kept patches to this file"
    )
    parser.add_argument("--json", action="store_true", help="print the whole response as JSON")
    parser.set_defaults(run=_run, error=parser.error)


def _run(asked: Any) -> int:
    if not asked.image and not asked.video:
        asked.error("name at least one --image or --video")
    try:
        body = _body(asked)
        answer = json.loads(_post(asked, body, "application/json"))
        if asked.png is not None:
            try:
                asked.png.write_bytes(_post(asked, body, "image/png"))
            except OSError as error:
                raise ExplainError(f"cannot write {asked.png}: {error.strerror}") from None
    except ExplainError as error:
        print(f"flashvlm: {error}", file=sys.stderr)
        return 2
    if asked.json:
        print(json.dumps(answer))
    else:
        for line in _lines(answer):
            print(line)
    return 0


def _body(asked: Any) -> dict[str, Any]:
    content: list[dict[str, Any]] = [
        {"type": f"{kind}_url", f"{kind}_url": {"url": _url(name)}}
        for kind in ("image", "video")
        for name in getattr(asked, kind)
    ]
    content.append({"type": "text", "text": asked.question})
    fields = {BUDGET: asked.budget, SELECTOR: asked.selector, QUERY: asked.query}
    return {
        "model": asked.model or _served_model(asked),
        "messages": [{"role": "user", "content": content}],
        **{name: value for name, value in fields.items() if value is not None},
    }


def _url(name: str) -> str:
    if name.startswith(("http://", "https://", "data:")):
        return name
    try:
        data = Path(name).read_bytes()
    except OSError as error:
        raise ExplainError(f"cannot read {name}: {error.strerror}") from None
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _served_model(asked: Any) -> str:
    models = json.loads(_call(asked, "/v1/models"))["data"]
    name: str = models[0]["id"]
    return name


def _post(asked: Any, body: Mapping[str, Any], accept: str) -> bytes:
    headers = {"Content-Type": "application/json", "Accept": accept}
    return _call(asked, "/v1/visual_tokens", json.dumps(body).encode(), headers)


def _call(
    asked: Any, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> bytes:
    key = {} if asked.api_key is None else {"Authorization": f"Bearer {asked.api_key}"}
    url = f"{asked.url.rstrip('/').removesuffix('/v1')}{path}"
    try:
        request = urllib.request.Request(url, body, {**(headers or {}), **key})
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            page: bytes = answer.read()
            return page
    except urllib.error.HTTPError as error:
        raise ExplainError(f"{url} answered {error.code}: {_message(error)}") from None
    except (OSError, ValueError) as error:
        raise ExplainError(f"{url}: {getattr(error, 'reason', error)}") from None


def _message(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        found = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        found = text
    message = str(found["message"] if isinstance(found, dict) else found)
    if error.code == 404:
        message += " (does the server run with --plugins flashvlm?)"
    return message


def _lines(answer: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{answer['model']}, {answer[SELECTOR]}, budget {answer[BUDGET]}: "
        f"{answer['kept']} of {answer['total']} visual tokens, "
        f"{answer['prompt_tokens']} tokens in the prompt"
    )
    for item in answer["items"]:
        yield ""
        yield (
            f"{item['modality']} {item['width']}x{item['height']}: "
            f"{item['kept']} of {item['total']} kept{', merged' if item['merged'] else ''}"
        )
        covered = item["coverage"]
        if covered is not None:
            yield (
                f"  from a dropped token to the nearest kept one: {covered['mean']:.3f} on "
                f"average, {covered['max']:.3f} at most (cosine distance)"
            )
        costs = [
            f"{cost[BUDGET]}: {'too few' if cost['kept'] is None else cost['kept']}"
            for cost in item["costs"]
        ]
        yield f"  kept at other budgets: {', '.join(costs)}"
        for part in item["parts"]:
            if part["columns"] <= _SHOWN_COLUMNS and not item["merged"]:
                yield ""
                yield from _grid(part)


def _grid(part: Mapping[str, Any]) -> Iterator[str]:
    kept = {tuple(place) for place in part["kept"]}
    for row in range(part["rows"]):
        cells = ("#" if (row, column) in kept else "." for column in range(part["columns"]))
        yield "  " + "".join(cells)


def _budget(text: str) -> Any:
    try:
        return as_json(parse_request_budget_text(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
