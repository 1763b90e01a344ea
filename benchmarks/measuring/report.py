# SPDX-License-Identifier: Apache-2.0
"""Tables, targets and the results file of a benchmark."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Mark:
    """A target, and the measurement that it is compared with."""

    asked: str
    found: str
    met: bool | None
    """None: too few measurements, neither met nor missed."""

    @property
    def verdict(self) -> str:
        """The result, as in tables."""
        return "not judged" if self.met is None else "met" if self.met else "missed"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table.

    Raises:
        ValueError: a row has more or fewer cells than the head.
    """
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"{len(row)} cells under {len(head)} headings: {row}")
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def marks_table(marks: Sequence[Mark]) -> str:
    """Return the targets, the measurements, and which targets are met."""
    rows = [(mark.asked, mark.found, mark.verdict) for mark in marks]
    return table(("target", "measured", ""), rows)


def missed(marks: Sequence[Mark]) -> bool:
    """Print missed targets to stderr; return whether there are any."""
    failures = [mark for mark in marks if mark.met is False]
    for mark in failures:
        print(f"missed: {mark.asked}: {mark.found}", file=sys.stderr)
    return bool(failures)


def instructions() -> str:
    """Return the vector instructions torch uses, such as ``AVX2``; rounding depends on them."""
    return torch.backends.cpu.get_cpu_capability()


def machine() -> dict[str, Any]:
    """Return the software and the machine that figures are of."""
    return {
        "vllm": version("vllm"),
        "torch": version("torch"),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "instructions": instructions(),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def write(
    path: Path, settings: Mapping[str, Any], figures: Mapping[str, Any], marks: Sequence[Mark]
) -> None:
    """Write a results file."""
    found = {
        "settings": dict(settings),
        "marks": [{**asdict(mark), "verdict": mark.verdict} for mark in marks],
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def say(line: str) -> None:
    """Print progress to stderr."""
    print(f"[load {os.getloadavg()[0]:.1f}] {line}", file=sys.stderr, flush=True)
