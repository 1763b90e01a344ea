# SPDX-License-Identifier: Apache-2.0
"""Judging the answers of a soak test."""

import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak import figures
from benchmarks.soak.bodies import CHAT, EXPLAIN, MESSAGES, TOKENIZE
from benchmarks.soak.calls import (
    BUDGETS,
    HEADER,
    Call,
    explained,
    finite_calls,
    fresh_call,
)
from benchmarks.soak.clients import Answer, read
from benchmarks.soak.expected import UNDER_LOAD, Expected, reduced_calls, without_load
from benchmarks.soak.memory import Peaks, ends
from benchmarks.soak.mistakes import MISTAKES
from benchmarks.soak.run import memory_figures, quantile
from benchmarks.soak.verdict import judge, judge_beginning
from flashvlm_vllm.selection.registry import BUILT_IN

QUIET = Answer(
    200, " a red cat", (10, 3, {"kept": 9}), ((" a", 2.0), (" red", 1e-4), (" cat", 1.0))
)


@pytest.mark.parametrize(
    ("loud", "verdict"),
    [
        (QUIET, "right"),
        (Answer(200, " a red cat", (10, 3, {"kept": 9})), "right"),
        (Answer(200, " a blue dog", (10, 3, {"kept": 9})), "near tie"),
        (Answer(200, " a blue dog", (10, 9, {"kept": 9})), "near tie"),
        (Answer(200, " a blue dog", (10, 3, {"kept": 8})), "wrong"),
        (Answer(200, " a red cat", (10, 3, {"kept": 8})), "wrong"),
        (Answer(200, " the red cat", (10, 3, {"kept": 9})), "wrong"),
        (Answer(200, " a red dog", (10, 3, {"kept": 9})), "wrong"),
        (Answer(200, " a red", (10, 2, {"kept": 9})), "wrong"),
        (Answer(500, "no", None), "wrong"),
    ],
)
def test_only_another_token_at_a_near_tie_is_accepted(loud: Answer, verdict: str) -> None:
    assert judge(QUIET, loud) == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("", "right"),
        (" a re", "right"),
        (" a blue", "near tie"),
        (" the", "wrong"),
        (" a red dog", "wrong"),
    ],
)
def test_the_beginning_of_an_answer_is_judged_too(text: str, verdict: str) -> None:
    assert judge_beginning(QUIET, Answer(200, text)) == verdict


def test_scores_may_differ_by_rounding_and_kept_patches_may_not() -> None:
    def answer(score: float, row: int) -> Answer:
        return Answer(200, "", {"items": [{"fused": [[score]], "kept": [[row, 2]]}]})

    assert judge(answer(0.5, 1), answer(0.50001, 1)) == "right"
    assert judge(answer(0.5, 1), answer(0.51, 1)) == "wrong"
    assert judge(answer(0.5, 1), answer(0.5, 2)) == "wrong"


def test_the_fixed_set_of_calls_is_deterministic_and_covers_all_options() -> None:
    calls = finite_calls(120, huge=False)
    assert [call.content for call in calls] == [
        call.content for call in finite_calls(120, huge=False)
    ]
    assert len(set(calls)) == 120
    bodies = [call.body for call in calls]
    metadata = [body["metadata"] for body in bodies if "metadata" in body]
    assert metadata
    budgets = {repr(body.get("visual_budget", "not said")) for body in bodies}
    assert budgets == {repr(each) for each in BUDGETS}
    methods = {body.get("visual_selector") for body in [*bodies, *metadata]}
    assert set(BUILT_IN) <= methods
    assert {call.path for call in explained(calls)} == {EXPLAIN}
    assert {body.get("visual_positions") for body in bodies} == {None, "kept", "closed"}
    assert {body.get("visual_steering") for body in bodies} == {None, "message", "latest", "own"}
    assert any(len(body.get("messages", [])) == 3 for body in bodies)
    assert any(HEADER in call.headers for call in calls)
    assert any(call.path == MESSAGES for call in calls)
    assert '"visual_budget"' in json.dumps([body.get("messages") for body in bodies])
    assert "video_url" not in json.dumps(bodies)
    assert "video_url" in json.dumps([call.body for call in finite_calls(20, videos=True)])


def test_under_load_the_answer_with_that_budget_is_expected_and_only_if_the_answer_says_so() -> (
    None
):
    def answer(text: str, **visual: Any) -> Answer:
        return Answer(200, text, (9, 2, visual), ((text, 1.0),))

    call = Call("a", CHAT, {}, takes_default=True)
    (reduced,) = reduced_calls([call, Call("b", CHAT, {})])
    assert reduced.body == {"visual_budget": UNDER_LOAD}
    quiet = {call: answer("red", kept=576)}
    expected = Expected(quiet, {reduced: answer("blue", kept=64)})
    assert expected.judge(call, answer("red", kept=576))[0] == "right"
    assert expected.judge(call, answer("blue", kept=64, under_load=True))[0] == "right"
    assert expected.judge(call, answer("blue", kept=64))[0] == "wrong"
    assert expected.judge(call, answer("red", kept=576, under_load=True))[0] == "wrong"
    assert expected.under_load == 2
    assert expected.judge_beginning(call, Answer(200, "bl"))[0] == "right"
    assert expected.judge_beginning(call, Answer(200, "gr"))[0] == "wrong"
    asked = Call("c", CHAT, {})
    only = Expected({asked: answer("red", kept=9)}, {})
    assert only.judge(asked, answer("red", kept=9, under_load=True))[0] == "wrong"


def test_a_tokenized_prompt_has_one_of_two_lengths_under_load() -> None:
    call = Call("a", TOKENIZE, {}, takes_default=True)
    (reduced,) = reduced_calls([call])
    expected = Expected({call: Answer(200, "", 600)}, {reduced: Answer(200, "", 80)})
    found = [expected.judge(call, Answer(200, "", count))[0] for count in (600, 80, 81)]
    assert found == ["right", "right", "wrong"]


def test_what_an_answer_says_about_load_is_found_at_any_depth() -> None:
    assert without_load((3, {"images": [{"kept": 2, "under_load": True}]})) == (
        (3, {"images": [{"kept": 2}]}),
        True,
    )
    assert without_load({"kept": 2}) == ({"kept": 2}, False)


def test_new_calls_differ_and_are_reproducible() -> None:
    assert fresh_call(7).content == fresh_call(7).content
    assert fresh_call(7).content != fresh_call(8).content
    assert fresh_call(7).path == CHAT


def test_mistakes_have_distinct_names() -> None:
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)


def test_an_answer_is_reduced_to_its_deterministic_parts() -> None:
    body = {
        "id": "x",
        "choices": [
            {
                "message": {"content": " a"},
                "logprobs": {
                    "content": [
                        {"token": " a", "top_logprobs": [{"logprob": -0.5}, {"logprob": -2.0}]}
                    ]
                },
            }
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 1, "visual_tokens": {"kept": 2}},
    }
    answer = read(fresh_call(1), 200, json.dumps(body))
    assert answer == Answer(200, " a", (5, 1, {"kept": 2}), ((" a", 1.5),))
    assert read(fresh_call(1), 400, "why") == Answer(400, "why")


def test_memory_peaks_of_this_process() -> None:
    peaks = Peaks(os.getpid())
    peaks.begin()
    held = bytearray(64 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    first = peaks.take()
    del held
    peaks.begin()
    second = peaks.take()
    assert first["API server"] - second["API server"] > 32
    assert peaks.by_process["API server"] == [first["API server"], second["API server"]]
    before, after = peaks.own_by_process["API server"]
    assert 32 < before - after < 96


def test_first_and_last_memory_figures_of_a_run() -> None:
    assert ends([9.0] * 5, 5, max) is None
    assert ends([9.0] * 6, 5, max) is None
    minutes = [99.0] * 5 + [10.0] * 10 + [50.0] * 5 + [10.0] * 9 + [11.0]
    found = ends(minutes, 5, max)
    assert found is not None
    assert (found.first, found.last, found.ratio) == (10.0, 11.0, 1.1)
    usual = ends(minutes, 5, statistics.median)
    assert usual is not None
    assert (usual.first, usual.last) == (10.0, 10.0)


def test_quantiles() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([], 0.5) is None


@pytest.fixture
def soak() -> Iterator[dict[str, Any]]:
    yield {
        "commit": "abc",
        "machine": {"vllm": "0", "torch": "0", "cores": 2},
        "minutes": 60,
        "clients": 3,
        "allocator": "glibc",
        "requests": 100,
        "faults": 20,
        "wrong": 0,
        "lost": 0,
        "near_ties": 1,
        "compared": 90,
        "new_compared": 5,
        "unstable_when_quiet": [],
        "changed_afterwards": [],
        "idle_afterwards": True,
        "by_kind": {"whole": 100},
        "seconds": {"median": 1, "99th": 2},
        "memory": memory_figures(
            {"API server": [9.0] * 5 + [100.0, 104.0]}, {"API server": [50.0] * 7}
        ),
    }


def test_the_report_keeps_its_other_sections(tmp_path: Path, soak: dict[str, Any]) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n<!-- soak -->\nold\n<!-- end of soak -->\n\nThe end.\n")
    figures.write(tmp_path, "soak", soak, page)
    fault = {"what": "it is hit", "seen": "it falls", "commit": "abc", "requests": 7, "faults": 1}
    figures.write_fault(tmp_path, "hit", {**fault, "wrong": 0, "near_ties": 0, "lost": 0}, page)
    figures.write(tmp_path, "soak", {**soak, "requests": 321}, page)
    text = (tmp_path / "report.md").read_text()
    assert "| soak, 60 minutes | 321 | 20 | 0 | 1 | 0 | 100 MiB | 104 MiB |" in text
    assert "| hit | 7 | 1 | 0 | 0 | 0 |" in text
    assert "| hit | it is hit | it falls | abc |" in text
    found = json.loads((tmp_path / "results.json").read_text())
    assert page.read_text() == (
        f"# Page\n\n<!-- soak -->\n{figures.summary(found)}\n<!-- end of soak -->\n\nThe end.\n"
    )


@pytest.mark.parametrize(
    ("worse", "is_well"),
    [
        ({}, True),
        ({"wrong": 1}, False),
        ({"lost": 1}, False),
        ({"idle_afterwards": None}, False),
        ({"changed_afterwards": ["x"]}, False),
        ({"memory": memory_figures({"x": [1.0] * 7}, {"x": [1.0] * 6 + [1.1]})}, False),
        ({"memory": memory_figures({"x": [1.0] * 6 + [1.1]}, {"x": [1.0] * 7})}, False),
    ],
)
def test_a_soak_with_errors_is_not_reported_as_passed(
    soak: dict[str, Any], worse: dict[str, Any], is_well: bool
) -> None:
    assert figures.soak_is_well({**soak, **worse}) is is_well


def test_the_report_is_generated_from_its_figures() -> None:
    folder = Path(figures.__file__).parent
    found = json.loads((folder / "results.json").read_text())
    assert (folder / "report.md").read_text() == figures.draw(found)
    assert figures.summary(found) in figures.PAGE.read_text()
    for section in found.values():
        for run in [section] if "requests" in section else section.values():
            assert (run["wrong"], run["lost"]) == (0, 0)
