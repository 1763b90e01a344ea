# SPDX-License-Identifier: Apache-2.0
"""Where a page's blocks run: a folder that looks like the repository, a PATH, servers."""

import functools
import http.server
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from testing.photo import FILES, photo
from testing.server import CPU_ENVIRONMENT, Server
from tests.docs import stand_in
from tests.docs.markdown import REPOSITORY, Block, blocks
from tests.docs.table import (
    CLIP,
    DROPPED_FLAGS,
    MODELS,
    PHOTOS,
    PICTURES,
    SERVER,
    SHARED_SERVER,
    SLOW,
    TEXT,
)

LIMIT = 600  # seconds for a block


class Step(NamedTuple):
    """A block to execute, and the command of the server that is running by then."""

    block: Block
    server: tuple[str, ...] | None

    @property
    def starts_server(self) -> bool:
        """Whether the block is the command that starts a server."""
        return self.block.language == "bash" and serve_command(self.block.text) is not None

    @property
    def is_slow(self) -> bool:
        """Whether the block takes too long for the quick tests."""
        needed = self.starts_server or SERVER in self.block.text
        own = needed and self.server not in (None, SHARED_SERVER)
        return own or any(word in self.block.text for word in SLOW)


def steps(page: Path) -> list[Step]:
    """Return a page's executable blocks in order."""
    server: tuple[str, ...] | None = None
    found = []
    for block in blocks(page):
        if block.language not in ("bash", "python") or block.file is not None:
            continue
        if block.language == "bash":
            server = serve_command(block.text) or server
        found.append(Step(block, server))
    return found


def serve_command(text: str) -> tuple[str, ...] | None:
    """Return model and flags if the block consists of a single `vllm serve`, else None."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if len(lines) != 1 or not lines[0].startswith("vllm serve "):
        return None
    lexer = shlex.shlex(lines[0], posix=True, punctuation_chars=True)
    lexer.whitespace_split = True  # else "128:8" is three words
    words = list(lexer)
    if words[-1] == "&":
        words.pop()
    # A second command or a pipe: not a server alone.
    if any(set(word) <= set(";&|<>()") for word in words):
        return None
    return tuple(words[2:])


def exchanged(text: str, server: str | None, pictures: str) -> str:
    """Return a block's text with the replacements of ``table.py``."""
    for name, (folder, build) in MODELS.items():
        if name in text:
            text = text.replace(name, str(build(REPOSITORY / ".models" / folder)))
    if SERVER in text:
        assert server is not None
        text = text.replace(f"http://{SERVER}", server)
        text = text.replace(SERVER, server.removeprefix("http://"))
    for written, here in {PICTURES: f"{pictures}/", **TEXT}.items():
        text = text.replace(written, here)
    return text


class Workspace:
    """A folder with the repository's files, the page's own, and pictures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.site = folder / ".site"  # target of `pip install` in a page
        self._bin = folder / ".bin"
        self._prepared: set[Path] = set()
        for path in REPOSITORY.iterdir():
            if not path.name.startswith(".") and path.name not in PHOTOS:
                (folder / path.name).symlink_to(path)
        # As after `make setup`; the environment is already active.
        activate = folder / ".venv" / "bin" / "activate"
        activate.parent.mkdir(parents=True)
        activate.touch()
        self._draw()
        self._fill_bin()

    def prepare(self, page: Path) -> None:
        """Save the blocks that the reader is asked to save, and install the page's own packages.

        Once a page, before its first block that runs: the block with the `pip install` may not
        be among the selected tests.
        """
        if page in self._prepared:
            return
        self._prepared.add(page)
        for block in blocks(page):
            if block.file is not None:
                path = self.folder / block.file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)
        for block in blocks(page):
            if block.language == "bash" and block.text.startswith("pip install ./"):
                self.run(block, block.text)

    def run(self, block: Block, text: str) -> None:
        """Execute a block; on failure, raise an assertion with its output."""
        shell = ["bash", "-euo", "pipefail", "-c", text]
        command = shell if block.language == "bash" else [sys.executable, "-c", text]
        # Only shell blocks have the restricted PATH; a Python program has the whole one.
        path = self._bin if block.language == "bash" else os.environ["PATH"]
        announced = re.search(r"#.*\b([45]\d\d)\b", text)
        ended = subprocess.run(
            command,
            cwd=self.folder,
            env={
                **self.environment,
                "PATH": str(path),
                **({"DOCS_HTTP_ERROR": announced[1]} if announced else {}),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert ended.returncode == 0, f"{block.name} failed\n{text}\n{ended.stdout[-6000:]}"

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of blocks and servers."""
        inherited = {
            name: text
            for name, text in os.environ.items()
            if name not in ("VLLM_PLUGINS", "FLASHVLM_TRACE_DIR")
        }
        path = [str(self.site), str(REPOSITORY), inherited.get("PYTHONPATH", "")]
        return {
            **inherited,
            **CPU_ENVIRONMENT,
            "HF_HUB_OFFLINE": "1",  # a model missing from the table is an error, not a download
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "DOCS_REAL_PATH": os.environ["PATH"],
            "DOCS_SITE": str(self.site),
        }

    def _draw(self) -> None:
        for file, name in zip(PHOTOS, FILES, strict=False):
            photo(name).save(self.folder / file)
        cat = photo("cat").resize((128, 96))
        clip = cv2.VideoWriter(
            str(self.folder / CLIP), cv2.VideoWriter.fourcc(*"mp4v"), 2, cat.size
        )
        for turn in range(8):
            clip.write(np.asarray(cat.rotate(5 * turn))[..., ::-1].copy())
        clip.release()

    def _fill_bin(self) -> None:
        self._bin.mkdir()
        for name in ("bash", *stand_in.RUN_AS_THEY_ARE):
            if found := shutil.which(name):
                (self._bin / name).symlink_to(found)
        for name in stand_in.STAND_INS:
            script = self._bin / name
            command = shlex.join([sys.executable, stand_in.__file__, name])
            script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            script.chmod(0o755)


class Servers:
    """The shared server, and at most one other."""

    def __init__(self, workspace: Workspace, logs: Path) -> None:
        self._workspace = workspace
        self._logs = logs
        self._up: dict[tuple[str, ...], Server] = {}

    def url(self, command: Sequence[str]) -> str:
        """Return the URL of a server with this command; start it if needed."""
        wanted = tuple(command)
        if wanted not in self._up:
            for other in [each for each in self._up if each != SHARED_SERVER]:
                self._up.pop(other).stop()
            self._up[wanted] = self._start(wanted)
        return self._up[wanted].url

    def stop(self) -> None:
        """Stop all servers."""
        while self._up:
            self._up.popitem()[1].stop()

    def _start(self, command: tuple[str, ...]) -> Server:
        text = exchanged(shlex.join(command), None, "")
        model, *flags = [word for word in shlex.split(text) if word not in DROPPED_FLAGS]
        environment = {
            name: text
            for name, text in self._workspace.environment.items()
            if name.startswith("DOCS_") or name in ("PYTHONPATH", "HF_HUB_OFFLINE")
        }
        log = self._logs / f"server-{len(list(self._logs.iterdir()))}.log"
        server = Server(model, flags, log=log, environment=environment)
        return server.__enter__()


class Pictures:
    """Serves a workspace's files over HTTP at the addresses that replace those in the pages."""

    def __init__(self, folder: Path) -> None:
        quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": _nothing})
        handler = functools.partial(quiet, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


def _nothing(*_: object) -> None:
    pass
