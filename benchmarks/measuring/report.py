# SPDX-License-Identifier: Apache-2.0
"""What every benchmark here ends with: tables, marks, a JSON file and an exit status."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Mark:
    """Something that was promised, and what came out."""

    asked: str
    found: str
    met: bool | None
    """None: measured too little to say, which is neither met nor missed."""

    @property
    def verdict(self) -> str:
        """As tables show it."""
        return "not judged" if self.met is None else "met" if self.met else "missed"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Draw a Markdown table.

    Raises:
        ValueError: a row has more or fewer cells than the head.
    """
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"{len(row)} cells under {len(head)} headings: {row}")
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def marks_table(marks: Sequence[Mark]) -> str:
    """What was asked, what came out, and whether that is enough."""
    rows = [(mark.asked, mark.found, mark.verdict) for mark in marks]
    return table(("asked", "found", ""), rows)


def missed(marks: Sequence[Mark]) -> bool:
    """Say on stderr which marks were missed, and whether any was."""
    failures = [mark for mark in marks if mark.met is False]
    for mark in failures:
        print(f"missed: {mark.asked}: {mark.found}", file=sys.stderr)
    return bool(failures)


def machine() -> dict[str, Any]:
    """Where figures come from; without them they mean little."""
    return {
        "vllm": version("vllm"),
        "torch": version("torch"),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def write(
    path: Path, settings: Mapping[str, Any], figures: Mapping[str, Any], marks: Sequence[Mark]
) -> None:
    """Write all that was measured as JSON."""
    found = {
        "settings": dict(settings),
        "marks": [{**asdict(mark), "verdict": mark.verdict} for mark in marks],
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def say(line: str) -> None:
    """Report progress apart from the result."""
    print(f"[load {os.getloadavg()[0]:.1f}] {line}", file=sys.stderr, flush=True)
