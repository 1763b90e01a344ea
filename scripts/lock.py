# SPDX-License-Identifier: Apache-2.0
"""Resolve the development environment into a lock file. ``make lock``.

The lock file holds an exact version of every package that ``make setup`` installs with vLLM's CPU
wheel. ``scripts/setup.sh`` gives it to pip as constraints. It has no hashes: which build of a
version is installed depends on the package index (PyTorch's CPU builds come from another one).

Versions in the file stay as long as they fit ``pyproject.toml``. ``--upgrade`` takes the newest.
"""

import argparse
import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements" / "dev-cpu.lock"

PYTHON = "3.11"
PLATFORM = "x86_64-manylinux_2_35"
HEADER = f"""\
# SPDX-License-Identifier: Apache-2.0
# Versions of the development environment with vLLM's CPU wheel. Written by `make lock`.
# For Python {PYTHON} on Linux x86_64.
"""
"""``scripts/setup.sh`` compares the last line with the environment."""

INDEX_OPTIONS = ("index-url", "extra-index-url", "find-links")


def index_options(config: str) -> list[str]:
    """Return uv's options for the package indexes that pip uses.

    Args:
        config: what ``pip config list`` prints: ``global.find-links='/wheels'`` and the like. uv
            does not read pip's configuration.

    """
    values: dict[str, str] = {}
    for line in config.splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        # Environment variables come first in the list, and take precedence.
        if name in INDEX_OPTIONS:
            values.setdefault(name, str(ast.literal_eval(value)))
    return [word for name in values for url in values[name].split() for word in (f"--{name}", url)]


def with_header(resolved: str) -> str:
    """Return uv's output below our header, in place of uv's own.

    Raises:
        ValueError: an address is in it, which is nobody else's business.

    """
    lines = resolved.splitlines(keepends=True)
    while lines and lines[0].startswith("#"):
        del lines[0]
    text = HEADER + "".join(lines)
    if "://" in text:
        raise ValueError("the lock file would hold the address of a package index")
    return text


def main() -> int:
    """Write the lock file; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make lock", description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    arguments = parser.parse_args()

    pip = [sys.executable, "-m", "pip", "config", "list"]
    config = subprocess.run(pip, capture_output=True, text=True, check=True).stdout
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml"]
    command += ["--extra", "dev", "--extra", "cpu", "--output-file", str(LOCK.relative_to(ROOT))]
    command += ["--python-version", PYTHON, "--python-platform", PLATFORM]
    command += ["--no-emit-index-url", "--no-emit-find-links", "--quiet"]
    # As pip does: the best version of any index, not of the first that has the package.
    command += ["--index-strategy", "unsafe-best-match", *index_options(config)]
    command += ["--upgrade"] if arguments.upgrade else []
    LOCK.parent.mkdir(exist_ok=True)
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        return 1
    LOCK.write_text(with_header(LOCK.read_text()))
    print(f"lock: wrote {LOCK.relative_to(ROOT)}; install it with `make setup`")
    return 0


if __name__ == "__main__":
    sys.exit(main())
