# SPDX-License-Identifier: Apache-2.0
"""Every flag and environment variable used under deploy/ exists, checked against vLLM itself."""

import ctypes.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.conftest import (
    DOCKERFILES,
    OVERLAYS,
    container,
    engine,
    environment,
    in_exec_form,
    instructions,
    pod,
)

OVERLAY_COMMANDS = {overlay: container(overlay)["args"] for overlay in OVERLAYS}
CHART_COMMAND = [engine()["modelURL"], *engine()["vllmConfig"]["extraArgs"]]


def ask_vllm(commands: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the parsed arguments of each ``vllm serve`` command, and the variables vLLM reads.

    Fails on an unknown flag. The plugin is enabled by the variable that the images set.
    """
    program = (
        "import json, sys\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "import vllm.envs\n"
        "parser = make_arg_parser(FlexibleArgumentParser())\n"
        "parsed = {k: vars(parser.parse_args(v)) for k, v in json.load(sys.stdin).items()}\n"
        "parsed['variables'] = sorted(vllm.envs.environment_variables)\n"
        "print(json.dumps(parsed, default=str))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps({name: list(command) for name, command in commands.items()}),
        env={**os.environ, "VLLM_PLUGINS": "flashvlm"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@cache
def vllm_report() -> dict[str, Any]:
    """Call vLLM once for all tests: starting it takes seconds."""
    images = {dockerfile: in_exec_form(dockerfile, "CMD") for dockerfile in DOCKERFILES}
    return ask_vllm({**OVERLAY_COMMANDS, **images, "chart": CHART_COMMAND})


def is_read_by_glibc(variable: str) -> bool:
    """Return whether the dynamic loader reports the value of the tunable that a variable sets."""
    program = Path("/proc/self/maps").read_text()
    loader = next(line.split()[-1] for line in program.splitlines() if "/ld-linux" in line)
    done = subprocess.run(
        [loader, "--list-tunables"],
        env={variable: "11259375"},
        capture_output=True,
        text=True,
        check=True,
    )
    return hex(11259375) in done.stdout


def is_read_by_the_loader(variable: str) -> bool:
    """Return whether the loader reports a missing library that the variable names."""
    done = subprocess.run(
        [sys.executable, "-c", ""],
        env={variable: "no-such-library.so"},
        capture_output=True,
        text=True,
        check=True,
    )
    return "no-such-library.so" in done.stderr


def exists(variable: str) -> bool:
    """Return whether any program in the images reads an environment variable."""
    if variable in vllm_report()["variables"] or variable in ("HOME", "MALLOC_CONF"):
        return True  # MALLOC_CONF belongs to jemalloc and has a test of its own
    if variable.startswith("LD_"):
        return is_read_by_the_loader(variable)
    if variable.startswith("MALLOC_"):
        return is_read_by_glibc(variable)
    hub = find_spec("huggingface_hub")
    assert hub is not None and hub.origin is not None
    sources = Path(hub.origin).parent.rglob("*.py")
    return any(f'"{variable}"' in source.read_text() for source in sources)


def test_flags_of_the_overlays_exist() -> None:
    for overlay in OVERLAYS:
        arguments = vllm_report()[overlay]
        assert arguments["visual_budget"] is None
        gpus = container(overlay)["resources"]["limits"].get("nvidia.com/gpu", "1")
        assert arguments["tensor_parallel_size"] == int(gpus)
        # Running requests and the preStop hook must end within the pod's grace period.
        hook = int(container(overlay)["lifecycle"]["preStop"]["exec"]["command"][-1])
        grace = pod(overlay)["terminationGracePeriodSeconds"]
        assert 0 < arguments["shutdown_timeout"] + hook < grace


def test_flags_of_the_images_exist() -> None:
    for dockerfile in DOCKERFILES:
        assert in_exec_form(dockerfile, "ENTRYPOINT") == ["vllm", "serve"]
        assert vllm_report()[dockerfile]["model_tag"] == in_exec_form(dockerfile, "CMD")[0]


def test_flags_of_the_chart_exist() -> None:
    arguments = vllm_report()["chart"]
    assert arguments["visual_budget"] is None
    assert 0 < arguments["shutdown_timeout"] < 30  # the chart sets no grace period


def test_environment_variables_exist() -> None:
    names = {variable["name"] for overlay in OVERLAYS for variable in container(overlay)["env"]}
    names |= {variable["name"] for variable in engine()["env"]}
    for dockerfile in DOCKERFILES:
        names |= set(environment(dockerfile))
    assert {"VLLM_API_KEY", "VLLM_PLUGINS", "HF_TOKEN", "HF_HOME"} <= names
    assert not {name for name in names if not exists(name)}
    assert not exists("VLLM_NO_SUCH_VARIABLE")
    assert not exists("MALLOC_NO_SUCH_VARIABLE")
    assert not exists("LD_NO_SUCH_VARIABLE")


def complaints(settings: str) -> str:
    """Return what jemalloc reports about settings, preloaded as in the CPU image."""
    preloaded = environment("Dockerfile.cpu")["LD_PRELOAD"]
    done = subprocess.run(
        [sys.executable, "-c", ""],
        env={"LD_PRELOAD": preloaded, "MALLOC_CONF": settings},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stderr


@pytest.mark.skipif(
    ctypes.util.find_library("jemalloc") is None, reason="jemalloc (libjemalloc2) not installed"
)
def test_jemalloc_accepts_its_settings() -> None:
    assert complaints(environment("Dockerfile.cpu")["MALLOC_CONF"]) == ""
    assert "no_such_setting" in complaints("no_such_setting:true")


def test_build_arguments_are_options_of_pip() -> None:
    names = {value.split("=")[0] for d in DOCKERFILES for i, value in instructions(d) if i == "ARG"}
    assert names == {"PIP_EXTRA_INDEX_URL"}
    # pip reads each option from a variable named PIP_ and the option's name.
    options = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in names:
        assert "--" + name.removeprefix("PIP_").lower().replace("_", "-") in options
