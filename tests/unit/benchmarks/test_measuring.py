# SPDX-License-Identifier: Apache-2.0
"""Code shared by the benchmarks: pairs, tables, targets, and reading a server."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measuring import metrics
from benchmarks.measuring.ask import ask, user
from benchmarks.measuring.pairs import compare
from benchmarks.measuring.pictures import picture
from benchmarks.measuring.report import Mark, marks_table, missed, table, write
from benchmarks.measuring.turn import Turn, percentiles

PAGE = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="llava"} %d.0
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{engine="0",model_name="llava"} 3.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="341"} 1.0
"""
EVENTS = (
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"delta": {"content": "a"}}]},
    {"choices": [{"delta": {"content": " dog"}}]},
    {"choices": [], "usage": {"prompt_tokens": 77, "visual_tokens": {"total": 576, "kept": 64}}},
)


@contextmanager
def fake_server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server whose metrics page reports a growing load; all chats get the same answer."""
    bodies: list[dict[str, Any]] = []
    loads = iter(range(1, 1000))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply((PAGE % min(7, next(loads))).encode())

        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            lines = [f"data: {json.dumps(event)}\n\n" for event in EVENTS]
            self.reply("".join([*lines, "data: [DONE]\n\n"]).encode())

        def reply(self, content: bytes) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_ratios_are_computed_pair_by_pair() -> None:
    """The machine becomes ten times slower; the ratio does not change."""
    compared = compare([2.0, 20.0, 200.0, 2.0, 2.0, 2.2], [1.0, 10.0, 100.0, 1.0, 1.0, 1.0])
    assert compared.median == 2
    assert compared.interval == (2.0, 2.2)
    assert str(compared) == "2.00 (2.00 to 2.20)"
    assert f"{compared:.1f}" == "2.0 (2.0 to 2.2)"


def test_five_pairs_have_no_interval() -> None:
    compared = compare([2.0] * 5, [1.0] * 5)
    assert compared.interval is None
    assert str(compared) == "2.00"


def test_unequal_or_missing_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no pairs"):
        compare([], [])


def test_a_table_row_of_another_length_is_refused() -> None:
    assert table(("a", "b"), [(1, "x")]).splitlines() == ["| a | b |", "| --- | --- |", "| 1 | x |"]
    with pytest.raises(ValueError, match="1 cells under 2"):
        table(("a", "b"), [(1,)])


def test_only_a_missed_target_counts_as_missed(capsys: pytest.CaptureFixture[str]) -> None:
    met, open_, failed = Mark("x", "1", True), Mark("y", "2", None), Mark("z", "3", False)
    assert not missed([met, open_])
    assert capsys.readouterr().err == ""
    assert missed([met, open_, failed])
    assert capsys.readouterr().err == "missed: z: 3\n"
    assert [
        row.split("|")[3].strip() for row in marks_table([met, open_, failed]).splitlines()[2:]
    ] == [
        "met",
        "not judged",
        "missed",
    ]


def test_the_json_file_has_settings_targets_and_figures(tmp_path: Path) -> None:
    file = tmp_path / "new" / "results.json"
    write(file, {"cores": 2}, {"levels": [1, 2]}, [Mark("x", "1", None)])
    found = json.loads(file.read_text())
    assert found["settings"] == {"cores": 2}
    assert found["levels"] == [1, 2]
    assert found["marks"] == [{"asked": "x", "found": "1", "met": None, "verdict": "not judged"}]


def test_metrics_are_parsed_from_the_page() -> None:
    with fake_server() as (url, _):
        found = metrics.page(url)
    assert metrics.value(found, metrics.PREEMPTIONS) == 3
    assert metrics.kv_blocks(found) == (340, 32)  # one block is reserved
    with pytest.raises(metrics.MetricsError, match="no_such_thing"):
        metrics.value(found, "no_such_thing")
    with pytest.raises(metrics.MetricsError, match="cache_config"):
        metrics.kv_blocks({})


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (32, 1), (33, 2), (640, 20), (640.5, 21)])
def test_the_last_kv_block_counts_as_a_whole(tokens: float, blocks: int) -> None:
    assert metrics.blocks_per_request(tokens, 32) == blocks


def test_the_peak_is_the_highest_observed_value() -> None:
    with fake_server() as (url, _):
        with metrics.Peak(url, every=0.001) as peak:
            while peak.running < 7:
                pass
        assert peak.running == 7


def test_a_reply_is_timed_and_its_tokens_are_counted() -> None:
    with fake_server() as (url, bodies):
        reply = ask(url, "llava", [user("What?", "data:x")], tokens=2, visual_budget=64)
    assert (reply.text, reply.prompt_tokens, reply.visual_tokens) == ("a dog", 77, 64)
    assert 0 < reply.ttft <= reply.seconds
    (body,) = bodies
    assert body["visual_budget"] == 64
    assert body["max_tokens"] == 2
    assert body["messages"][0]["content"][0]["image_url"] == {"url": "data:x"}


def test_pictures_differ_by_number_and_are_deterministic() -> None:
    numbers = (1, 2, 7, 13)
    assert len({picture(number).tobytes() for number in numbers}) == len(numbers)
    assert picture(5).tobytes() == picture(5).tobytes()
    assert picture(5, 672).size == (672, 672)


def test_a_turn_has_throughput_and_percentiles() -> None:
    turn = Turn(2.0, (0.1, 0.3, 0.2), (0.01, 0.01, 0.0123456))
    assert turn.requests_per_second == 1.5
    assert turn.as_json()["tpots"] == [0.01, 0.01, 0.01235]
    middle, tail = percentiles(turn.ttfts)
    assert middle == pytest.approx(0.2)
    assert 0.29 < tail <= 0.3
