# SPDX-License-Identifier: Apache-2.0
"""Functions of the task, for a row of ``questions.jsonl``; lmms-eval loads this file by path."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

SCENES = Path(__file__).resolve().parents[4] / "benchmarks" / "output" / "public" / "scenes"


def picture(row: Mapping[str, Any]) -> list[Image.Image]:
    """Return the scene's picture."""
    with Image.open(SCENES / row["picture"]) as image:
        return [image.convert("RGB")]


def words(row: Mapping[str, Any]) -> str:
    """Return the question, with nothing around it: its words are what steers the selection."""
    return str(row["question"])


def score(row: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Compare the words of the first answer with the right ones; case and a full stop are free."""
    said = answers[0].lower().replace(".", " ").split()
    return {"exact_match": float(said == str(row["answer"]).lower().split())}
