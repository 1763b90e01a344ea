# SPDX-License-Identifier: Apache-2.0
"""Folders that the benchmarks read and write."""

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
"""Of the repository."""
MODELS: Final = ROOT / ".models"
"""Models that are built for a benchmark; git ignores it."""


def committed(name: str) -> Path:
    """Return the folder of a benchmark, which has its committed results."""
    return ROOT / "benchmarks" / name


def scratch(name: str) -> Path:
    """Return a benchmark's folder for logs and smoke runs; git ignores it."""
    return ROOT / "benchmarks" / "output" / name
