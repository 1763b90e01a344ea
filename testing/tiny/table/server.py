# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` of a model of the table.

The processes that vLLM spawns import this module again: each of them knows the loader.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from testing.server import Server
from testing.tiny.llava import build_once
from testing.tiny.table.all import TABLE
from testing.tiny.table.serve import MODELS
from testing.tiny.table.weights import LOAD_FORMAT, register_loader

_ARCHITECTURE: Final = "TINY_ARCHITECTURE"


class TableServer(Server):
    """A ``vllm serve`` of a model of the table, its weights drawn."""

    def __init__(self, architecture: str, arguments: Sequence[str], *, log: Path) -> None:
        entry = TABLE[architecture]
        path = build_once(MODELS / architecture, {"kind": architecture}, entry.write)
        super().__init__(
            path,
            ("--load-format", LOAD_FORMAT, "--max-model-len", "4096", *arguments),
            log=log,
            environment={_ARCHITECTURE: architecture},
        )
        self.command = [sys.executable, "-m", "testing.tiny.table.server", *self.command[1:]]


def _prepare(architecture: str) -> None:
    """Prepare this process for the model."""
    register_loader()
    TABLE[architecture].prepare()


def main() -> int:
    """Run vLLM's command."""
    from vllm.entrypoints.cli.main import main as vllm

    sys.argv[0] = "vllm"
    vllm()
    return 0


if _ARCHITECTURE in os.environ:
    _prepare(os.environ[_ARCHITECTURE])

if __name__ == "__main__":
    sys.exit(main())
