# SPDX-License-Identifier: Apache-2.0
"""The CPU image's steps are executed, and its entry point serves a request with a budget."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from testing.photo import data_url, photo
from testing.tiny.llava import build_llava
from tests.deploy.conftest import ROOT, container, engine, in_exec_form, instructions
from tests.deploy.image import Image, as_kubernetes_starts_it

pytestmark = [pytest.mark.slow, pytest.mark.engine]


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    # Not pytest's tmp_path, which keeps the folders of the last three runs: gigabytes.
    with tempfile.TemporaryDirectory(prefix="flashvlm-image-") as folder:
        built = Image("Dockerfile.cpu", Path(folder))
        built.build()
        yield built


class Container:
    """The image's entry point, running."""

    def __init__(self, image: Image, confined: bool) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.image = image
        # The writable folders when the root is read-only: see volumeMounts of the manifests.
        mounts = [mount["mountPath"] for mount in container("cpu")["volumeMounts"]]
        writable = [image.place(mount) for mount in mounts if mount != "/dev/shm"]
        model = shutil.copytree(
            build_llava(ROOT / ".models" / "llava-clip"), image.place("/model"), dirs_exist_ok=True
        )
        given = container("cpu")["args"][1:]  # all but the model
        words = [*in_exec_form("Dockerfile.cpu", "ENTRYPOINT"), str(model), *given]
        words += ["--max-model-len=4096", "--dtype=float32", "--enforce-eager"]
        command = image.command([*words, "--host=127.0.0.1", f"--port={self.port}"])
        if confined:
            inside = as_kubernetes_starts_it(command, writable)
            if inside is None:
                pytest.skip("making the root read-only takes root and CAP_SYS_ADMIN")
            command = inside
        environment = image.variables() | {
            variable["name"]: variable["value"]
            for variable in (*container("cpu")["env"], *engine()["env"])
            if "value" in variable and variable["name"] != "VLLM_CACHE_ROOT"
        }
        # The chart of the production stack sets this one for every pod.
        environment["PROMETHEUS_MULTIPROC_DIR"] = str(image.place("/tmp"))
        environment |= {"VLLM_API_KEY": "secret", "VLLM_CPU_KVCACHE_SPACE": "1"}
        for name in ("VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"):
            if name in os.environ:
                environment[name] = os.environ[name]
        self.log = image.folder / "server.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                env=environment,
                cwd=image.place("/home/flashvlm"),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def healthy(self) -> bool:
        """Return the result of the image's own HEALTHCHECK."""
        (value,) = (v for name, v in instructions("Dockerfile.cpu") if name == "HEALTHCHECK")
        words = json.loads(value.partition(" CMD ")[2])
        words = [word.replace(":8000/", f":{self.port}/") for word in words]
        check = subprocess.run(self.image.command(words), capture_output=True, check=False)
        return check.returncode == 0

    def wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.healthy():
            printed = self.log.read_text(errors="replace")[-3000:]
            assert self.process.poll() is None, f"the server ended:\n{printed}"
            assert time.monotonic() < deadline, f"not healthy after {seconds} s:\n{printed}"
            time.sleep(1)

    def stop(self) -> int:
        """Stop it as Kubernetes does; return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module", params=["plain", "read-only root, no capabilities"])
def running(image: Image, request: pytest.FixtureRequest) -> Iterator[Container]:
    started = Container(image, confined=request.param != "plain")
    try:
        started.wait(400)
        yield started
    finally:
        assert started.stop() == 0


def ask(running: Container, budget: int | None, key: str = "secret") -> httpx.Response:
    picture = {"type": "image_url", "image_url": {"url": data_url(photo("astronaut"))}}
    question = {"type": "text", "text": "what color is the suit?"}
    return httpx.post(
        f"http://127.0.0.1:{running.port}/v1/chat/completions",
        headers={"Authorization": f"Bearer {key}"},
        json={
            "model": str(running.image.place("/model")),
            "messages": [{"role": "user", "content": [picture, question]}],
            "max_tokens": 4,
            **({} if budget is None else {"visual_budget": budget}),
        },
        timeout=120,
    )


def test_only_system_steps_are_skipped(image: Image) -> None:
    assert [step.split()[0] for step in image.left_out] == ["apt-get", "useradd"]
    # Build files are removed, and the installed plugin is not this checkout.
    assert not image.place("/wheels").exists() and not list(image.place("/setup").glob("*"))
    where = "import flashvlm_vllm; print(flashvlm_vllm.__file__)"
    found = subprocess.run(
        image.command(["python3", "-c", where]),
        cwd=image.folder, env=image.variables(), capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert Path(found.strip()).is_relative_to(image.place("/python"))


def test_request_with_a_budget_is_answered(running: Container) -> None:
    whole, pruned = ask(running, None), ask(running, 64)
    assert (whole.status_code, pruned.status_code) == (200, 200), pruned.text
    costs = [answer.json()["usage"]["prompt_tokens"] for answer in (whole, pruned)]
    assert costs[0] - costs[1] == 576 - 64
    assert pruned.json()["usage"]["visual_tokens"]["kept"] == 64
    metrics = httpx.get(f"http://127.0.0.1:{running.port}/metrics", timeout=30).text
    kept = [line for line in metrics.splitlines() if line.startswith("flashvlm_visual_tokens_kept")]
    assert sum(float(line.rsplit(" ", 1)[1]) for line in kept) > 0


def test_a_wrong_api_key_is_refused(running: Container) -> None:
    assert ask(running, 64, key="wrong").status_code == 401
