# SPDX-License-Identifier: Apache-2.0
"""Helpers that read and render the files under deploy/."""

import io
import json
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = sorted(folder.name for folder in (DEPLOY / "kubernetes" / "overlays").iterdir())
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")


def tool(name: str) -> str:
    """Return the path of a command that the dev dependencies install next to this Python."""
    return str(Path(sys.executable).with_name(name))


@cache
def rendered(overlay: str) -> tuple[dict[str, Any], ...]:
    """Return the objects that ``kubectl apply -k`` would send for an overlay."""
    folder = DEPLOY / "kubernetes" / "overlays" / overlay
    done = subprocess.run(
        [tool("kubectl"), "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def one(overlay: str, kind: str) -> dict[str, Any]:
    (found,) = (document for document in rendered(overlay) if document["kind"] == kind)
    return found


def pod(overlay: str) -> dict[str, Any]:
    """Return the pod spec of an overlay's Deployment."""
    return dict(one(overlay, "Deployment")["spec"]["template"]["spec"])


def container(overlay: str) -> dict[str, Any]:
    (only,) = pod(overlay)["containers"]
    return dict(only)


@cache
def production_stack() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "production-stack" / "values.yaml").read_text()))


def engine() -> dict[str, Any]:
    """Return the only model of the values for the production stack."""
    (only,) = production_stack()["servingEngineSpec"]["modelSpec"]
    return dict(only)


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile with their values, without comments."""
    parser = DockerfileParser(fileobj=io.BytesIO((DEPLOY / dockerfile).read_bytes()))
    return [
        (step["instruction"], step["value"])
        for step in parser.structure
        if step["instruction"] != "COMMENT"
    ]


def environment(dockerfile: str) -> dict[str, str]:
    """Return the variables that the last ``ENV`` of a Dockerfile sets."""
    (*_, value) = (value for name, value in instructions(dockerfile) if name == "ENV")
    return dict(pair.split("=", 1) for pair in shlex.split(value))


def in_exec_form(dockerfile: str, instruction: str) -> list[str]:
    """Return the words of the last ``CMD`` or ``ENTRYPOINT``."""
    (*_, value) = (value for name, value in instructions(dockerfile) if name == instruction)
    return list(json.loads(value))
