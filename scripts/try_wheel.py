# SPDX-License-Identifier: Apache-2.0
"""Build the wheel, install it in a new environment and try it there. ``make wheel-check``.

The new environment has the wheel of its own, and everything else, vLLM included, from the
environment that this runs in. The package in the working tree cannot stand in for a file that the
wheel lacks: its editable install is not visible there.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "flashvlm_vllm"
DISTRIBUTION = "flashvlm-vllm"
SOURCES = ("pyproject.toml", "README.md", "LICENSE", PACKAGE)

# Runs in the new environment. The tower's and the selection's kernels are imported as well: on a
# CPU without Triton they must not fail before they are called.
TRIAL = f"""
import importlib, pkgutil, sys
from importlib.metadata import distribution, entry_points

import {PACKAGE}

def is_installed(module):
    return module.__file__.startswith(sys.prefix)

assert is_installed({PACKAGE}), {PACKAGE}.__file__
for own in distribution("{DISTRIBUTION}").entry_points:
    found = [each for each in entry_points(group=own.group) if each.name == own.name]
    assert found == [own], f"{{own.group}} has {{own.name}} not once: {{found}}"
    own.load()
    assert is_installed(sys.modules[own.module]), own
    print(f"entry point {{own.group}}: {{own.name}} = {{own.value}}")
modules = [each.name for each in pkgutil.walk_packages({PACKAGE}.__path__, "{PACKAGE}.")]
for name in modules:
    assert is_installed(importlib.import_module(name)), name
print(f"{{len(modules)}} modules can be imported")
"""


class WheelError(Exception):
    """The wheel is incorrect."""


def build(folder: Path) -> Path:
    """Build the wheel in ``folder`` and return it.

    From a copy: what an earlier build left in the working tree would end up in the wheel.
    """
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            without = shutil.ignore_patterns("__pycache__", "*.py[cod]")
            shutil.copytree(ROOT / name, source / name, ignore=without)
        else:
            shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


def package_files(root: Path) -> set[str]:
    """Return the package's files in a source tree, relative to the tree."""
    return {
        path.relative_to(root).as_posix()
        for path in (root / PACKAGE).rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }


def check_contents(names: Iterable[str], expected: set[str]) -> None:
    """Compare the files in a wheel with those of the package.

    Raises:
        WheelError: a file is missing, or there is one too many.

    """
    found = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    problems = [f"{name} is missing" for name in sorted(expected - found)]
    problems += [f"{name} is not part of the package" for name in sorted(found - expected)]
    if problems:
        raise WheelError("; ".join(problems))


def make_environment(folder: Path, wheel: Path) -> Path:
    """Install the wheel in a new environment that uses this one's packages; return its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", wheel)
    # A folder named in a .pth file is searched last, and its own .pth files are not read: so the
    # editable install in it has no effect. The one of scripts/prepare_environment.py is needed.
    packages = Path(sysconfig.get_path("purelib"))
    lines = [f"{packages}\n"]
    torchvision = packages / "torchvision_without_cuda.pth"
    if torchvision.exists():
        lines.append(torchvision.read_text())
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "packages_of_the_other_environment.pth").write_text("".join(lines))
    return python


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a command and return what it prints.

    Raises:
        WheelError: it failed.

    """
    # Without the caller's path and plugins.
    left_out = ("PYTHONPATH", "VLLM_PLUGINS")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise WheelError(
            f"{' '.join(map(str, command))[:200]} failed:\n{done.stdout}{done.stderr}".rstrip()
        )
    return done.stdout


def main() -> int:
    """Build, install and try the wheel; returns the exit status."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name).resolve()
            wheel = build(folder)
            print(f"try_wheel: built {wheel.name}", flush=True)
            if wheel.name.split("-")[1] != version:
                raise WheelError(f"the wheel is not of version {version}")
            expected = package_files(ROOT)
            with zipfile.ZipFile(wheel) as archive:
                check_contents(archive.namelist(), expected)
            print(f"try_wheel: it has all {len(expected)} files of the package", flush=True)
            python = make_environment(folder / "environment", wheel)
            for line in run(python, "-c", TRIAL, cwd=folder).splitlines():
                print(f"try_wheel: {line}", flush=True)
            command = python.with_name("flashvlm")
            run(command, "--help", cwd=folder)
            print("try_wheel: flashvlm --help answers", flush=True)
            run(command, "doctor", cwd=folder)
            print("try_wheel: flashvlm doctor finds nothing wrong", flush=True)
    except WheelError as error:
        print(f"try_wheel: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
