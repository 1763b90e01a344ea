# SPDX-License-Identifier: Apache-2.0
"""The benchmark of several questions about one image, without a server."""

import json
from typing import Any

import pytest

from benchmarks.measuring.ask import Reply
from benchmarks.measuring.folders import ROOT, committed
from benchmarks.measuring.order import rotated
from benchmarks.multiturn import answers, conversation, run
from benchmarks.multiturn.figures import (
    CACHED,
    COLUMNS,
    OFF,
    OWN,
    STOCK,
    Series,
    encoded_later,
    later,
    marks,
    mode_table,
)


def series(second: float, encoded: int | None = 0, images: int = 12) -> list[Series]:
    """Return series whose first question takes one second, on a machine that slows down."""
    return [
        Series((1.0 * slow, second * slow, second * slow), encoded, (90, 91, 92))
        for slow in range(1, images + 1)
    ]


def verdicts(cached: list[Series]) -> list[bool | None]:
    return [mark.met for mark in marks({"independent": {CACHED: cached}})]


def test_the_second_question_is_compared_image_by_image() -> None:
    compared = later(series(0.25))
    assert (compared.median, compared.interval) == (0.25, (0.25, 0.25))


def test_targets_require_a_quick_second_question_and_no_encoder_call() -> None:
    assert verdicts(series(0.3)) == [True, True]
    assert verdicts(series(0.36)) == [False, True]
    assert verdicts(series(0.3, encoded=1)) == [True, False]
    assert verdicts(series(0.3, encoded=None)) == [True, None]
    assert verdicts(series(0.3, images=5)) == [None, True]
    assert marks({"independent": {STOCK: series(0.9)}}) == []


def test_later_questions_of_a_conversation_are_compared_with_stock() -> None:
    def verdict(second: float) -> list[bool | None]:
        columns = {STOCK: series(0.1, None), CACHED: series(second), OWN: series(0.1)}
        found = [each for each in marks({"conversation": columns}) if "of stock's" in each.asked]
        return [each.met for each in found]

    assert verdict(0.105) == [True, True]
    assert verdict(0.12) == [False, True]


def test_the_sum_is_missing_if_one_server_does_not_count() -> None:
    assert encoded_later(series(0.3, encoded=2, images=3)) == 6
    assert encoded_later([*series(0.3), *series(0.3, encoded=None)]) is None


def test_the_table_has_a_column_per_question() -> None:
    rows = mode_table({STOCK: series(0.5, None), CACHED: series(0.25)}).splitlines()
    assert rows[0].count("TTFT") == 3
    assert "0.50 (0.50 to 0.50) | not counted |" in rows[2]
    assert "0.25 (0.25 to 0.25) | 0 of 24 |" in rows[3]


def test_every_server_is_in_every_place() -> None:
    rounds = [rotated(COLUMNS, index) for index in range(len(COLUMNS))]
    assert all(sorted(place) == sorted(COLUMNS) for place in zip(*rounds, strict=True))


def test_only_the_cached_column_has_the_cache_and_stock_has_no_flag() -> None:
    assert run.CACHE[STOCK] == ()
    assert run.CACHE[OFF] == ("--visual-feature-cache-gb", "0")
    assert float(run.CACHE[CACHED][1]) > 0


@pytest.fixture
def sent_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Return the requests that would be sent."""
    sent: list[tuple[list[dict[str, Any]], dict[str, Any]]] = []

    def ask(url: str, model: str, messages: Any, tokens: int, **fields: Any) -> Reply:
        sent.append(([*messages], fields))
        return Reply("a dog", 0.1 * len(sent), 1.0, 90, 64)

    monkeypatch.setattr(run, "ask", ask)
    monkeypatch.setattr(run, "encoded", lambda url: 10 + len(sent))
    return sent


def test_every_independent_request_contains_the_image(sent_requests: Any) -> None:
    one = run.question_series("url", CACHED, "independent", 3)
    assert len(sent_requests) == len(run.QUESTIONS) == 5
    assert [len(messages) for messages, _ in sent_requests] == [1] * 5
    images = {messages[0]["content"][0]["image_url"]["url"] for messages, _ in sent_requests}
    assert len(images) == 1
    assert all(fields == {"visual_budget": 64} for _, fields in sent_requests)
    assert one.encoded == 4  # the image of the first question does not count
    assert one.ttfts == pytest.approx((0.1, 0.2, 0.3, 0.4, 0.5))


def test_a_conversation_grows_and_has_the_image_in_its_first_message_only(
    sent_requests: Any,
) -> None:
    run.question_series("url", CACHED, "conversation", 3)
    assert [len(messages) for messages, _ in sent_requests] == [1, 3, 5, 7, 9]
    last, _ = sent_requests[-1]
    assert [message["role"] for message in last[:3]] == ["user", "assistant", "user"]
    assert sum("image_url" in str(message["content"]) for message in last) == 1


def test_requests_to_stock_have_no_budget(sent_requests: Any) -> None:
    one = run.question_series("url", STOCK, "independent", 3)
    assert all(fields == {} for _, fields in sent_requests)
    assert one.encoded is None


def turns(computed: list[int], ttft: float = 0.1) -> list[list[conversation.Turn]]:
    return [[conversation.Turn(each, 10 * each, ttft) for each in computed]]


@pytest.mark.parametrize(
    ("own", "ttft", "met"),
    [
        ([100, 20, 20, 20], 0.1, [True, True, True]),
        ([100, 33, 20, 20], 0.1, [True, True, True]),  # within a block of stock's
        ([100, 20, 90, 20], 0.1, [False, False, True]),
        ([100, 20, 20, 20], 0.2, [True, True, False]),
    ],
)
def test_a_conversation_is_judged_by_turn_and_in_all(
    own: list[int], ttft: float, met: list[bool]
) -> None:
    found = {column: turns([600, 1, 40, 40], 0.1) for column in conversation.COLUMNS}
    found["64, by message"] = turns(own, ttft)
    judged = conversation.marks(found)[:3]
    assert [mark.met for mark in judged] == met
    assert "64, by message" in conversation.report(found)


def test_the_page_shows_the_committed_conversations() -> None:
    page = (committed("multiturn") / "README.md").read_text()
    assert conversation.report(conversation.read()) in page


def test_the_page_shows_the_committed_answers() -> None:
    page = (committed("multiturn") / "README.md").read_text()
    assert answers.report(json.loads(answers.FILE.read_text())["right"]) in page


def test_a_question_about_the_earlier_picture_does_not_fit_the_newer_one() -> None:
    for each in answers.conversations(5):
        messages, question = answers.FORMS["another question about the first of two pictures"](each)
        assert len([part for message in messages for part in message["content"]]) > 5
        assert question == each.first[1]
        assert messages[-1]["content"] == [{"type": "text", "text": question.text}]


def test_the_readme_quotes_the_tokens_of_a_conversation() -> None:
    found = conversation.read()
    share = sum(conversation.computed(found["64, by message"])) / sum(
        conversation.computed(found[conversation.STOCK])
    )
    readme = (ROOT / "README.md").read_text()
    assert f"relative to stock vLLM | 1 | {share:.2f} |" in readme
