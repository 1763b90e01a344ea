# SPDX-License-Identifier: Apache-2.0
"""Observability of a running server: metrics, log lines, ``flashvlm doctor``."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from flashvlm_vllm.cli import main, probe
from flashvlm_vllm.request.refusal import Reason
from testing.photo import data_url, photo
from testing.server import Server
from tests.deploy.expressions import FROM_PROMETHEUS, expressions, series
from tests.engine.test_server import ARGUMENTS, QUESTION, URL, Client, conversation

KEY = "a key that clients have"
FILE_NAME = "holiday-in-samarkand.png"


class KeyedClient(Client):
    """Sends the API key of the server."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.openai = self.openai.with_options(api_key=KEY)

    def send(self, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
        body = {"model": self.server.model, "messages": conversation(), "max_tokens": 4, **fields}
        headers = {"authorization": f"Bearer {KEY}"}
        return httpx.post(f"{self.server.url}{path}", json=body, headers=headers, timeout=120)

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        page = httpx.get(f"{self.server.url}/metrics", timeout=30).text
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
        }

    def lines(self) -> list[dict[str, Any]]:
        """Return the structured log lines so far."""
        found = re.findall(r"flashvlm request (\{.*\})", self.server.log)
        return [json.loads(each) for each in found]


@pytest.fixture(scope="module")
def client(clip_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyedClient]:
    """A server with an API key, a default budget, two API processes and debug logging."""
    options = ("--plugins", "flashvlm", "--visual-budget", "96", "--api-key", KEY)
    options += ("--api-server-count", "2", "--served-model-name", "eyes", str(clip_llava))
    log = tmp_path_factory.mktemp("sight") / "log"
    environment = {"VLLM_LOGGING_LEVEL": "DEBUG"}
    with Server(clip_llava, (*options, *ARGUMENTS), log=log, environment=environment) as server:
        yield KeyedClient(server)


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def added(before: Samples, after: Samples, name: str, **labels: str) -> float:
    """Return the total increase of the samples with a name and these labels."""
    wanted = set(labels.items())
    return sum(
        value - before.get(key, 0.0)
        for key, value in after.items()
        if key[0] == name and wanted <= set(key[1])
    )


def test_items_are_counted_by_budget_and_selector_over_all_api_processes(
    client: KeyedClient,
) -> None:
    before = client.samples()
    requests: list[dict[str, Any]] = [
        {"visual_budget": 64},
        {"visual_budget": 0.25},
        {"visual_budget": 0.25, "visual_selector": "uniform"},
        {"visual_budget": 10**30},
        {"visual_budget": None},
        {},
    ]
    for fields in requests:
        client.send(**fields).raise_for_status()
    after = client.samples()
    image = {"model_name": "eyes", "modality": "image"}
    assert added(before, after, "flashvlm_visual_tokens_seen_total", **image) == 6 * 576
    kept = 64 + 144 + 144 + 576 + 576 + 96
    assert added(before, after, "flashvlm_visual_tokens_kept_total", **image) == kept
    for labels, count in (
        ({"budget": "request", "selector": "flashvlm"}, 3),
        ({"budget": "request", "selector": "uniform"}, 1),
        ({"budget": "none", "selector": "none"}, 1),
        ({"budget": "default", "selector": "flashvlm"}, 1),
    ):
        assert added(before, after, "flashvlm_visual_items_total", **image, **labels) == count
    tokens, shares = "flashvlm_visual_budget_tokens", "flashvlm_visual_budget_ratio"
    for name, at_most, count in (
        (tokens, "64.0", 1), (tokens, "128.0", 1), (tokens, "192.0", 3), (tokens, "768.0", 4),
        (shares, "0.1", 0), (shares, "0.15", 1), (shares, "0.25", 3), (shares, "0.99", 3),
        (shares, "1.0", 4),
    ):  # fmt: skip
        bucket = {"budget": "request", "le": at_most}
        assert added(before, after, f"{name}_bucket", **image, **bucket) == count, (name, at_most)
    assert added(before, after, f"{tokens}_sum", budget="default") == 96


def test_rendered_only_requests_are_not_counted(client: KeyedClient) -> None:
    before = client.samples()
    assert client.send("/tokenize", visual_budget=64).json()["count"] < 100
    assert added(before, client.samples(), "flashvlm_visual_tokens_seen_total") == 0


REFUSED: list[tuple[Reason, dict[str, Any]]] = [
    (Reason.BAD_BUDGET, {"visual_budget": 0}),
    (Reason.BAD_BUDGET, {"metadata": {"visual_budget": "many"}}),
    (Reason.BAD_QUERY, {"visual_query": 3}),
    (Reason.BAD_SELECTOR, {"visual_selector": 3}),
    (Reason.BAD_SELECTOR, {"visual_selector": " "}),
    (Reason.UNKNOWN_SELECTOR, {"visual_selector": "a-name-of-someone"}),
]


@pytest.mark.parametrize(("reason", "fields"), REFUSED, ids=repr)
def test_a_refusal_is_counted_once_by_its_reason(
    client: KeyedClient, reason: Reason, fields: dict[str, Any]
) -> None:
    before = client.samples()
    assert client.send(**fields).status_code == 400
    after = client.samples()
    assert added(before, after, "flashvlm_refusals_total") == 1
    assert added(before, after, "flashvlm_refusals_total", reason=reason.value) == 1
    assert client.lines()[-1]["refused"] == reason.value


def test_every_refusal_reason_has_a_counter_from_the_start(client: KeyedClient) -> None:
    reasons = {
        dict(labels)["reason"]
        for name, labels in client.samples()
        if name == "flashvlm_refusals_total"
    }
    assert reasons == {reason.value for reason in Reason}


def test_each_request_logs_one_line_with_its_result(client: KeyedClient) -> None:
    before = len(client.lines())
    answer = client.send(visual_budget=0.25, visual_selector="uniform").json()
    (line,) = client.lines()[before:]
    assert line.pop("rendering_ms") > 0
    assert line == {
        "request_id": answer["id"],
        "model": "eyes",
        "images": 1,
        "videos": 0,
        "total": 576,
        "kept": 144,
        "budget": 0.25,
        "is_default": False,
        "selector": "uniform",
        "refused": None,
    }
    client.send(stream=True)
    client.send(messages=[{"role": "user", "content": "no picture, no line"}])
    (streamed,) = client.lines()[before + 1 :]
    assert streamed["kept"] == 96
    assert streamed["is_default"]


def test_the_plugins_log_lines_contain_no_user_content(client: KeyedClient, tmp_path: Path) -> None:
    words = "who painted the turquoise minaret"
    picture = data_url(photo("rocket"))
    named = conversation(words, picture)
    named[0]["content"][0]["uuid"] = FILE_NAME
    requests: list[dict[str, Any]] = [
        {"messages": named, "visual_budget": 32},
        {"messages": named, "visual_budget": 32, "visual_query": "a turquoise dome"},
        {"messages": named, "visual_budget": words},
        {"messages": named, "visual_selector": words},
        {"messages": named, "metadata": {"visual_budget": words}},
        {"messages": conversation(words, f"file:///{FILE_NAME}")},
        {"messages": conversation(words, f"http://127.0.0.1:9/{FILE_NAME}")},
        {"messages": conversation(words, URL[: len(URL) // 2])},
    ]
    before = len(client.lines())
    for fields in requests:
        client.send(**fields)
    assert len(client.lines()) - before >= 5
    # vLLM prefixes a log line with the file that logs it.
    mark = re.compile(r"(request_log|metrics|rendering|outcome)\.py:\d+\]|\] flashvlm\b")
    ours = [line for line in client.server.log.splitlines() if mark.search(line)]
    assert len(ours) >= len(requests)
    secrets = ("turquoise", "minaret", "samarkand", QUESTION, "suit", "base64", "file:", "http:")
    secrets += (picture[1000:1040], URL[1000:1040])
    for line in ours:
        assert not [each for each in secrets if each in line], line


def test_dashboard_and_alerts_use_existing_metrics(client: KeyedClient) -> None:
    client.send(visual_budget=64).raise_for_status()
    on_page: dict[str, set[str]] = {}
    for name, labels in client.samples():
        on_page.setdefault(name, set()).update(label for label, _ in labels)
    for where, text in expressions():
        for name, labels in series(text):
            assert name in on_page, where
            assert labels - FROM_PROMETHEUS <= on_page[name], where


def test_the_doctor_reports_no_problem_on_a_healthy_server(
    client: KeyedClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "flashvlm")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")  # otherwise the doctor silences the next tests
    status = main.main(["doctor", "--url", client.server.url, "--api-key", KEY])
    output = capsys.readouterr()
    assert status == 0, output.out
    assert "16 of 576 visual tokens of a test image were kept" in output.out
    assert KEY not in output.out + output.err
    assert not re.findall(r"^(note|wrong)", output.out, re.MULTILINE)


def test_the_doctor_reports_a_missing_api_key(client: KeyedClient) -> None:
    *_, (level, text) = probe.answers(f"{client.server.url}/v1", None, 30.0)
    assert level == "wrong"
    assert "--api-key" in text
