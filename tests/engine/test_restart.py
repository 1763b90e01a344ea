# SPDX-License-Identifier: Apache-2.0
"""A server ends when its worker dies; a new server starts with empty caches and equal answers."""

import os
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from testing.server import Server
from tests.engine.test_server import ARGUMENTS, Client, text_of

QUESTIONS = ("what color is the suit?", "where is the flag?")


def workers_of(server: Server) -> list[int]:
    """Return the process ids of the workers, found by their process titles."""
    group = os.getpgid(server._process.pid)  # type: ignore[union-attr]
    listed = subprocess.run(["ps", "-e", "-o", "pid=,pgid=,args="], capture_output=True, text=True)
    found = []
    for line in listed.stdout.splitlines():
        pid, pgid, name = line.split(None, 2)
        if int(pgid) == group and "Worker" in name:
            found.append(int(pid))
    return found


@pytest.mark.slow
def test_a_killed_worker_ends_the_server_and_a_new_one_answers_alike(
    clip_llava: Path, tmp_path: Path
) -> None:
    options = ("--plugins", "flashvlm", *ARGUMENTS)
    with Server(clip_llava, options, log=tmp_path / "first") as server:
        client = Client(server)
        answers = [text_of(client.ask(question, visual_budget=64)) for question in QUESTIONS]
        (worker,) = workers_of(server)
        os.kill(worker, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{server.url}/health", timeout=5).status_code != 200:
                    break
            except httpx.TransportError:
                break
            time.sleep(0.5)
        else:
            pytest.fail("the server is healthy without its worker")
    with Server(clip_llava, options, log=tmp_path / "second") as server:
        client = Client(server)
        # In reverse order, so that nothing depends on the first server's caches.
        again = [text_of(client.ask(question, visual_budget=64)) for question in QUESTIONS[::-1]]
        assert again[::-1] == answers
        assert client.metric("flashvlm_feature_cache_misses") == 1
        assert client.metric("flashvlm_feature_cache_hits") == 1
