# SPDX-License-Identifier: Apache-2.0
"""The command line that the benchmarks share, and how they end."""

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring.report import Mark, missed, write


def command_line(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with ``--output`` and ``--check``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--output", type=Path, help="folder for results.json and report.md; default: its own"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    return parser


def stop_servers_on_sigterm() -> None:
    """Turn SIGTERM into an exit that runs clean-up code, so that servers are stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def publish(
    folder: Path,
    settings: Mapping[str, Any],
    figures: Mapping[str, Any],
    marks: Sequence[Mark],
    report: str,
    *,
    check: bool,
) -> int:
    """Write ``results.json`` and ``report.md`` and print the report.

    Args:
        folder: of the two files.
        settings: the conditions of the run.
        figures: what was measured.
        marks: the targets.
        report: Markdown.
        check: whether a missed target is a failure.

    Returns:
        the exit status.

    """
    write(folder / "results.json", settings, figures, marks)
    (folder / "report.md").write_text(f"{report.strip()}\n")
    print(report)
    return 1 if missed(marks) and check else 0
