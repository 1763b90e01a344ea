# SPDX-License-Identifier: Apache-2.0
"""Builds an image without a container engine, as far as possible, and starts the result.

A virtual environment replaces the Python of the base image, and a folder replaces the root of
each stage: absolute paths of the Dockerfile are moved into it. Steps that change the system
(packages of Debian, the user) are skipped and listed. ``ARG`` has no effect: the package index
comes from this machine's pip configuration.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.deploy.conftest import ROOT, instructions

SYSTEM_COMMANDS = ("apt-get", "useradd")
PLACES = ("/source", "/wheels", "/setup", "/cache", "/home/flashvlm", "/tmp")
"""Folders of the image that appear in its steps and its variables."""


class BuildError(RuntimeError):
    """A step failed; the message has the step and the end of its output."""


class Image:
    """One Dockerfile, built below ``folder``."""

    def __init__(self, dockerfile: str, folder: Path) -> None:
        self.dockerfile = dockerfile
        self.folder = folder
        self.left_out: list[str] = []
        self.environment: dict[str, str] = {}
        self._stage = Path()
        self._stages: dict[str, Path] = {}

    def build(self) -> None:
        """Run the steps in order; the last stage is the image."""
        for name, value in instructions(self.dockerfile):
            step = getattr(self, f"_{name.lower()}", None)
            if step is not None:
                step(value)

    def place(self, path: str) -> Path:
        """Return where an absolute path of the image lies on this machine."""
        return self._stage / path.lstrip("/")

    def command(self, words: Sequence[str]) -> list[str]:
        """Return a command of the image, with the program as a path of this machine."""
        return [str(self._stage / "python" / "bin" / words[0]), *words[1:]]

    def variables(self) -> dict[str, str]:
        """Return the environment of a container, plus what every process on this machine needs."""
        kept = {
            "HOME",
            "LANG",
            "PIP_CERT",
            "PIP_FIND_LINKS",
            "PIP_INDEX_URL",
            "PIP_EXTRA_INDEX_URL",
        }
        own = {name: text for name, text in os.environ.items() if name in kept}
        python = self._stage / "python" / "bin"
        path = f"{python}:/usr/local/bin:/usr/bin:/bin"
        return {**own, "PATH": path, "TMPDIR": str(self.place("/tmp")), **self.environment}

    def _from(self, value: str) -> None:
        base, _, name = value.partition(" AS ")
        wanted = re.match(r"python:(\d+\.\d+)-", base)
        here = f"{sys.version_info.major}.{sys.version_info.minor}"
        assert wanted is not None and wanted[1] == here, (
            f"{base} is not this machine's Python {here}"
        )
        self._stage = self.folder / f"stage-{len(self._stages)}"
        self._stages[name] = self._stage
        self.environment = {}
        for place in ("/cache", "/home/flashvlm", "/tmp"):
            self.place(place).mkdir(parents=True)
        self._do([sys.executable, "-m", "venv", str(self._stage / "python")])

    def _copy(self, value: str) -> None:
        *sources, target = value.split()
        root = ROOT
        if sources[0].startswith("--from="):
            root = self._stages[sources.pop(0).removeprefix("--from=")]
        for source in sources:
            path = root / source.lstrip("/")
            if path.is_dir():  # Docker copies the content of a folder
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(path, self.place(target), ignore=ignored, dirs_exist_ok=True)
            else:
                self.place(target).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.place(target))

    def _run(self, value: str) -> None:
        if value.split()[0] in SYSTEM_COMMANDS:
            self.left_out.append(value)
            return
        self._do(["sh", "-euc", self._moved(value)])

    def _env(self, value: str) -> None:
        for pair in shlex.split(value):
            name, _, text = pair.partition("=")
            self.environment[name] = self._moved(text)

    def _moved(self, text: str) -> str:
        """Return the text with absolute paths moved into the stage's folder."""
        for path in re.findall(r"(?<![\w.:/*-])/[a-z][\w/]*", text):
            if not any(Path(path).is_relative_to(place) for place in PLACES):
                raise BuildError(f"{path} would be this machine's own; add it to PLACES: {text}")
        places = "|".join(PLACES)
        return re.sub(rf"(?<![\w.:/*-])(?:{places})\b", lambda m: str(self.place(m[0])), text)

    def _do(self, command: Sequence[str]) -> None:
        done = subprocess.run(
            command,
            env=self.variables(),
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
        )
        if done.returncode != 0:
            raise BuildError(f"{shlex.join(command)}\n{(done.stdout + done.stderr)[-2000:]}")


def as_kubernetes_starts_it(command: Sequence[str], writable: Sequence[Path]) -> list[str] | None:
    """Wrap a command in a mount namespace without privileges where only some folders are writable.

    None if this machine does not allow it: it needs root and ``CAP_SYS_ADMIN``.
    """
    lines = ["mount --make-rprivate /"]
    lines += [
        f"mount --bind {shlex.quote(str(place))} {shlex.quote(str(place))}" for place in writable
    ]
    lines += ["mount -o remount,bind,ro /"]
    rights = "exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all"
    inside = ["unshare", "--mount", "sh", "-euc"]
    if shutil.which("setpriv") is None or shutil.which("unshare") is None:
        return None
    outside = shlex.quote(str(writable[0].parent / "must-not-be"))
    probe = "; ".join([*lines, f"{rights} sh -c {shlex.quote(f'! touch {outside}')}"])
    if subprocess.run([*inside, probe], capture_output=True, check=False).returncode != 0:
        return None
    return [*inside, "; ".join([*lines, f"{rights} {shlex.join(command)}"])]
