# SPDX-License-Identifier: Apache-2.0
"""Two pods behind the production stack's router: effect of its routing policies on images.

The router is not on PyPI. It is run from a checkout with a Python that has its requirements
(``src/vllm_router/requirements.txt``): ``PRODUCTION_STACK=.../production-stack`` and
``PRODUCTION_STACK_PYTHON=.../bin/python``.
"""

import base64
import contextlib
import io
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy
import pytest
from PIL import Image

from testing.server import Server
from testing.tiny.llava import build_llava
from tests.deploy.conftest import ROOT, production_stack

STACK = os.environ.get("PRODUCTION_STACK")
PYTHON = os.environ.get("PRODUCTION_STACK_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.engine,
    pytest.mark.skipif(
        STACK is None or PYTHON is None,
        reason="PRODUCTION_STACK and PRODUCTION_STACK_PYTHON name no router",
    ),
]
HEADER = production_stack()["routerSpec"]["sessionKey"]
LONG = "Look at the picture carefully, and then say in one short sentence what you see in it. " * 3


class Work(NamedTuple):
    """Requests and encoded images of a pod."""

    requests: int
    images_encoded: int


class Pods:
    """Two servers, and routers in front of them."""

    def __init__(self, servers: tuple[Server, Server]) -> None:
        self.servers = servers
        self._before = self._count()
        self._images = iter(range(10**6))

    def _count(self) -> list[Work]:
        return [
            Work(
                self._metric(server, "vllm:request_success_total"),
                self._metric(server, "flashvlm_feature_cache_misses"),
            )
            for server in self.servers
        ]

    def _metric(self, server: Server, name: str) -> int:
        lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
        return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)))

    def work(self) -> list[Work]:
        """Return the work of each pod since the last call, the busiest first."""
        before, self._before = self._before, self._count()
        done = [
            Work(*(n - b for n, b in zip(*pair, strict=True)))
            for pair in zip(self._before, before, strict=True)
        ]
        return sorted(done, reverse=True)

    def image(self) -> str:
        """Return an image that no pod has seen."""
        pixels = numpy.random.default_rng(next(self._images)).integers(0, 255, (64, 64, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.astype(numpy.uint8)).save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

    @contextlib.contextmanager
    def router(self, *arguments: str) -> Iterator[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        backends = ",".join(server.url for server in self.servers)
        assert STACK is not None and PYTHON is not None
        command = [
            PYTHON, "-m", "vllm_router.app", "--host", "127.0.0.1", "--port", port,
            "--service-discovery", "static", "--static-backends", backends,
            "--static-models", "tiny,tiny", *arguments,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(Path(STACK) / "src")}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(120):
                assert process.poll() is None, "the router ended"
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                        break
                time.sleep(0.5)
            self.work()
            yield url
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    model, logs = build_llava(ROOT / ".models" / "llava-clip"), tmp_path_factory.mktemp("pods")
    options = ("--max-model-len", "4096", "--plugins", "flashvlm", "--served-model-name", "tiny")
    with (
        Server(model, options, log=logs / "first") as first,
        Server(model, options, log=logs / "second") as second,
    ):
        yield Pods((first, second))


def ask(url: str, text: str, image: str, budget: Any = 64, session: str | None = None) -> Any:
    picture = {"type": "image_url", "image_url": {"url": image}}
    return httpx.post(
        f"{url}/v1/chat/completions",
        headers={} if session is None else {HEADER: session},
        json={
            "model": "tiny",
            "max_tokens": 2,
            "visual_budget": budget,
            "messages": [{"role": "user", "content": [picture, {"type": "text", "text": text}]}],
        },
        timeout=120,
    )


SESSIONS = ("--routing-logic", "session", "--session-key", HEADER)


def test_budgets_and_refusals_pass_through_the_router(pods: Pods) -> None:
    with pods.router(*SESSIONS) as url:
        answer = ask(url, "what is it?", pods.image())
        assert answer.json()["usage"]["visual_tokens"]["kept"] == 64
        refused = ask(url, "what is it?", pods.image(), budget=0)
        assert refused.status_code == 400 and "visual_budget" in refused.text


def test_session_routing_sends_all_requests_for_an_image_to_one_pod(pods: Pods) -> None:
    image = pods.image()
    with pods.router(*SESSIONS) as url:
        for number in range(12):
            assert ask(url, f"{number}?", image, session="one image").status_code == 200
        assert pods.work() == [Work(12, 1), Work(0, 0)]


def test_prefix_aware_routing_ignores_images(pods: Pods) -> None:
    with pods.router("--routing-logic", "prefixaware") as url:
        # Different questions go to different pods, and each encodes the same image.
        image = pods.image()
        for number in range(12):
            assert ask(url, f"{number}?", image).status_code == 200
        assert sum(pod.images_encoded for pod in pods.work()) == 2
        # The same long question goes to one pod, although all images differ.
        for _ in range(8):
            assert ask(url, LONG, pods.image()).status_code == 200
        assert pods.work() == [Work(8, 8), Work(0, 0)]
