# SPDX-License-Identifier: Apache-2.0
"""The manifests render, and every flag in them exists. No container engine is needed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
DEPLOY = Path(__file__).parents[2] / "deploy"


def container() -> dict[str, Any]:
    deployment = yaml.safe_load((DEPLOY / "kubernetes" / "deployment.yaml").read_text())
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(only)


def test_vllm_knows_every_flag_of_the_deployment() -> None:
    program = (
        "import sys\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "args = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])\n"
        "print(args.plugins, args.visual_budget)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *container()["args"]],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "['flashvlm'] None"


def test_gpus_asked_for_are_gpus_limited_and_loading_is_never_killed() -> None:
    spec = container()
    assert spec["resources"]["requests"] == spec["resources"]["limits"]
    startup = spec["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1200


def test_image_and_plugin_are_pinned_together() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    pins = (DEPLOY.parent / "pyproject.toml").read_text()
    (base,) = re.findall(r"FROM vllm/vllm-openai:v(\d+\.\d+)\.\d+", dockerfile)
    assert f'gpu = ["vllm>={base},' in pins
    assert "USER vllm" in dockerfile
    version = re.search(r'^version = "(.+)"$', pins, re.MULTILINE)
    assert version is not None
    assert f"newTag: {version[1]}" in (DEPLOY / "kubernetes" / "kustomization.yaml").read_text()


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_renders() -> None:
    rendered = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY / "kubernetes")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    kinds = [document["kind"] for document in yaml.safe_load_all(rendered)]
    assert sorted(kinds) == ["Deployment", "Service"]
