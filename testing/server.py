# SPDX-License-Identifier: Apache-2.0
"""Starts and stops a real ``vllm serve`` for the demo, the tests and the benchmarks."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

CPU_ARGUMENTS = ("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8")
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}


class ServerError(RuntimeError):
    """The server did not start; the message ends with its last lines."""


class Server:
    """A ``vllm serve`` on a free local port; a context manager that stops it."""

    def __init__(
        self,
        model: Path | str,
        arguments: Sequence[str] = (),
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        timeout: float = 300.0,
        python: Path | str = sys.executable,
    ) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.model = str(model)
        self.command = [
            str(Path(python).with_name("vllm")), "serve", self.model,
            "--host", "127.0.0.1", "--port", str(self.port), *CPU_ARGUMENTS, *arguments,
        ]  # fmt: skip
        # Plugins are named by the command, so that an inherited name cannot hide a broken flag.
        inherited = {name: text for name, text in os.environ.items() if name != "VLLM_PLUGINS"}
        self._environment = {**inherited, **CPU_ENVIRONMENT, **(environment or {})}
        self._log = log
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Server":
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                self.command,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def process_id(self) -> int:
        """The id of the server's first process, and of the session of all its processes.

        Raises:
            ServerError: it does not run.

        """
        if self._process is None:
            raise ServerError("the server does not run")
        return self._process.pid

    @property
    def log(self) -> str:
        """The server's output so far."""
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        """End the server and every process it started."""
        process, self._process = self._process, None
        if process is None:
            return
        for attempt in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, attempt)
            except ProcessLookupError:
                break
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                continue
        # Workers that outlive their parent would keep its memory and cores.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(f"the server ended at start:\n{self._tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise ServerError(f"the server is not up after {self._timeout:.0f} s:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self.log.splitlines()[-30:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
