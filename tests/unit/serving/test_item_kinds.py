# SPDX-License-Identifier: Apache-2.0
"""The items in ``usage.visual_tokens`` and in a request's log line."""

import json
from typing import Any

import pytest

from flashvlm_vllm.request.budget import ItemCount
from flashvlm_vllm.serving import request_log
from flashvlm_vllm.serving.request_context import Collected
from flashvlm_vllm.serving.usage import summary

IMAGE, VIDEO, CHUNK = (
    ItemCount(100, kept, kind) for kept, kind in ((10, "image"), (20, "video"), (30, "video_chunk"))
)


@pytest.mark.parametrize(
    ("counts", "images", "others"),
    [
        ([IMAGE], [10], {}),
        ([IMAGE, VIDEO, IMAGE], [10, 10], {"videos": [20]}),
        ([CHUNK, IMAGE, CHUNK], [10], {"video_chunks": [30, 30]}),
        ([CHUNK], [], {"video_chunks": [30]}),
    ],
)
def test_items_are_listed_by_kind(counts: Any, images: list[int], others: Any) -> None:
    found = summary(counts)
    assert (found.pop("total"), found.pop("kept")) == (
        100 * len(counts),
        sum(each.kept for each in counts),
    )
    assert {name: [each["kept"] for each in own] for name, own in found.items()} == {
        "images": images,
        **others,
    }


@pytest.mark.parametrize(
    ("counts", "numbers"),
    [
        ([IMAGE], {"images": 1, "videos": 0}),
        ([CHUNK, IMAGE, CHUNK], {"images": 1, "videos": 0, "video_chunks": 2}),
    ],
)
def test_the_log_line_has_the_number_of_each_kind(
    counts: Any, numbers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(request_log.logger, "isEnabledFor", lambda _: True)
    monkeypatch.setattr(request_log.logger, "debug", lambda form, *own: lines.append(form % own))
    request_log.log_request(None, None, Collected(counts=counts))
    (line,) = lines
    fields = json.loads(line.removeprefix(request_log.PREFIX))
    kinds = {"images", "videos", "video_chunks"}
    assert {name: own for name, own in fields.items() if name in kinds} == numbers
