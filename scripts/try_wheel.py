# SPDX-License-Identifier: Apache-2.0
"""Build sdist and wheel, install the wheel in a new environment and try it. ``make wheel-check``.

The wheel is built from the sdist. The new environment has the wheel of its own, and everything
else, vLLM included, from the environment that this runs in. The package in the working tree cannot
stand in for a file that the wheel lacks: its editable install is not visible there.

With ``--clean`` the new environment has nothing of this one: pip installs vLLM's CPU wheel and
ours, and a server is started in it and gets a request with a budget (several minutes).
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
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


def build(folder: Path) -> tuple[Path, Path]:
    """Build sdist and wheel in ``folder`` and return both.

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
    backend = f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", backend, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, sdist)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


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


def make_clean_environment(folder: Path, wheel: Path) -> Path:
    """Install vLLM's CPU wheel and ours in a new environment; return its Python."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (vllm,) = extras["optional-dependencies"]["cpu"]
    run(python, "-m", "pip", "install", "--quiet", vllm, wheel)
    run(python, ROOT / "scripts" / "prepare_environment.py")
    return python


def ask_server(python: Path, log: Path) -> str:
    """Start a server in an environment; return what ``flashvlm doctor`` says about it.

    It sends a request with a budget, and counts the kept tokens.

    Raises:
        WheelError: something is wrong.

    """
    from testing.server import Server

    # Without the working tree, which the caller's path may have.
    own = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    options = ("--plugins", "flashvlm")
    model = ROOT / "small_vlm" / "weights"
    with Server(model, options, log=log, environment=own, python=python) as server:
        return run(python.with_name("flashvlm"), "doctor", "--url", server.url, cwd=log.parent)


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
    parser = argparse.ArgumentParser(prog="scripts.try_wheel", description=__doc__)
    parser.add_argument("--clean", action="store_true", help="with nothing of this environment")
    asked = parser.parse_args()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name).resolve()
            sdist, wheel = build(folder)
            print(f"try_wheel: built {sdist.name}, and from it {wheel.name}", flush=True)
            if wheel.name.split("-")[1] != version:
                raise WheelError(f"the wheel is not of version {version}")
            expected = package_files(ROOT)
            with zipfile.ZipFile(wheel) as files:
                check_contents(files.namelist(), expected)
            with tarfile.open(sdist) as archive:
                names = [name.partition("/")[2] for name in archive.getnames()]
            check_contents((name for name in names if name in expected), expected)
            print(f"try_wheel: both have all {len(expected)} files of the package", flush=True)
            make = make_clean_environment if asked.clean else make_environment
            python = make(folder / "environment", wheel)
            for line in run(python, "-c", TRIAL, cwd=folder).splitlines():
                print(f"try_wheel: {line}", flush=True)
            command = python.with_name("flashvlm")
            run(command, "--help", cwd=folder)
            print("try_wheel: flashvlm --help answers", flush=True)
            run(command, "doctor", cwd=folder)
            print("try_wheel: flashvlm doctor finds nothing wrong", flush=True)
            if asked.clean:
                listed = run(python, "-m", "pip", "list", "--format", "freeze").split()
                versions = [line for line in listed if line.startswith(("vllm", "flashvlm"))]
                print(f"try_wheel: installed by pip: {', '.join(versions)}", flush=True)
                for line in ask_server(python, folder / "server.log").splitlines():
                    print(f"try_wheel: {line}", flush=True)
    except WheelError as error:
        print(f"try_wheel: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
