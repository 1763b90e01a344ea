# SPDX-License-Identifier: Apache-2.0
"""Every command in the README and in docs/ is executed.

``table.py`` lists what is replaced (models, port, pictures), ``stand_in.py`` the commands that
cannot run in the tests and the checks done instead. All others run unchanged, in reading order;
commands after a ``vllm serve`` use that server.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.markdown import REPOSITORY, Block, pages
from tests.docs.table import SERVER, SHARED_SERVER
from tests.docs.workspace import Pictures, Servers, Step, Workspace, exchanged, serve_command, steps

if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # see tests/engine/conftest.py
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(int(worker.removeprefix("gw")) % os.cpu_count())

STEPS = [
    pytest.param(step, id=step.block.name, marks=[pytest.mark.slow] if step.is_slow else [])
    for page in pages()
    for step in steps(page)
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def servers(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(workspace, tmp_path_factory.mktemp("logs"))
    yield servers
    servers.stop()


@pytest.fixture(scope="module")
def pictures(workspace: Workspace) -> Iterator[Pictures]:
    pictures = Pictures(workspace.folder)
    yield pictures
    pictures.stop()


@pytest.mark.engine
@pytest.mark.parametrize("step", STEPS)
def test_the_block_runs(
    step: Step, workspace: Workspace, servers: Servers, pictures: Pictures
) -> None:
    workspace.prepare(step.block.page)
    if step.starts_server:
        assert step.server is not None
        servers.url(step.server)
        return
    # A page that starts no server uses the default one.
    url = servers.url(step.server or SHARED_SERVER) if SERVER in step.block.text else None
    workspace.run(step.block, exchanged(step.block.text, url, pictures.url))


@pytest.mark.parametrize(
    "text",
    [
        "frobnicate --all",
        "true | frobnicate",
        "vllm serve llava-hf/llava-1.5-7b-hf --plugins flashvlm; true",
        "make no-such-target",
        "docker build -f deploy/NoSuchFile .",
        "docker run postgres",
        "kubectl kustomize deploy/no-such-folder",
        "kubectl apply -k deploy/no-such-folder",
        "pip install left-pad",
        "pip install vllm==0.1.0",
        "python -m benchmarks.serving.run --no-such-flag",
        "python -m benchmarks serving --no-such-flag",
        "python -m benchmarks no-such-benchmark",
        "flashvlm no-such-command",
        "curl http://localhost:8000/health",
    ],
)
def test_wrong_or_unknown_commands_fail(text: str, workspace: Workspace) -> None:
    """The test above can fail, so a page cannot contain a command that is not executed."""
    assert serve_command(text) is None
    closed = "http://127.0.0.1:9"
    with pytest.raises(AssertionError, match="failed"):
        block = Block(REPOSITORY / "docs" / "page.md", 1, "bash", None, text)
        workspace.run(block, exchanged(text, closed, closed))


def test_vllm_serve_must_be_alone_in_its_block() -> None:
    assert serve_command("# GPU\nvllm serve MODEL \\\n  --plugins flashvlm  # ours\n") == (
        "MODEL", "--plugins", "flashvlm",
    )  # fmt: skip
    assert serve_command("vllm serve MODEL\ncurl URL\n") is None


def test_all_pages_are_included() -> None:
    named = {step.values[0].block.page.name for step in STEPS}
    assert {"README.md", "quickstart.md", "request.md", "selectors.md"} <= named
    assert Path("docs/README.md") in {page.relative_to(REPOSITORY) for page in pages()}
