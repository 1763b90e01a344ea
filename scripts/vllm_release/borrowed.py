# SPDX-License-Identifier: Apache-2.0
"""Runs tests on the Python of a release without a CPU wheel, with another release's CPU kernels.

Useful for configuration, registration, processors, wraps, and engines as far as the kernels fit. A
failure inside a kernel has no meaning.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path


def assemble(python_files: Path, kernels: Path, release: str, target: Path) -> Path:
    """Write a folder that can be put before the installed packages on the path.

    Args:
        python_files: ``vllm`` of the release.
        kernels: ``vllm`` of an installed CPU wheel.
        release: the release's version.
        target: the folder to write; replaced if it exists.

    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(python_files, target / "vllm")
    for library in kernels.glob("*.so"):
        (target / "vllm" / library.name).symlink_to(library)
    # vLLM treats a build as a CPU one when its version contains "cpu".
    metadata = target / f"vllm-{release}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n")
    return target


def run_tests(folder: Path, root: Path, tests: list[str], *, slow: bool = False) -> int:
    """Run tests with the result of ``assemble``; return pytest's exit status."""
    wanted = "not gpu" if slow else "not slow and not gpu"
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{folder}"}
    command = [sys.executable, "-m", "pytest", "-m", wanted, *tests]
    return subprocess.run(command, cwd=root, env=environment, check=False).returncode
