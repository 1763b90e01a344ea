# SPDX-License-Identifier: Apache-2.0
"""Writes drawn scenes with questions as a local data set: images next to ``questions.jsonl``.

Run from the repository root: ``python -m benchmarks.public.scenes --scenes 40``.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from benchmarks.measuring.folders import scratch
from small_vlm.language import questions
from small_vlm.scenes import draw, sample_scene

FOLDER: Final = scratch("public") / "scenes"
FEWEST_THINGS: Final = 3
MOST_THINGS: Final = 7


def write_scenes(folder: Path, scenes: int, per_scene: int, seed: int) -> int:
    """Write scenes with up to ``per_scene`` questions about each; returns how many questions.

    The same arguments write the same files. What the folder held before is removed.
    """
    for name, number in (("scenes", scenes), ("per_scene", per_scene)):
        if number < 1:
            raise ValueError(f"{name} must be 1 or more, got {number}")
    rng = np.random.default_rng(seed)
    shutil.rmtree(folder / "pictures", ignore_errors=True)
    (folder / "pictures").mkdir(parents=True)
    rows: list[dict[str, object]] = []
    for number in range(scenes):
        scene = sample_scene(rng, int(rng.integers(FEWEST_THINGS, MOST_THINGS + 1)))
        picture = f"pictures/{number:04d}.png"
        Image.fromarray(draw(scene)).save(folder / picture)
        asked = questions(scene, rng)
        for index in rng.permutation(len(asked))[:per_scene].tolist():
            question = asked[index]
            rows.append(
                {
                    "id": len(rows),
                    "picture": picture,
                    "family": question.family,
                    "question": question.text,
                    "answer": question.answer,
                }
            )
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "questions.jsonl").write_text(lines)
    return len(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the data set that the task ``drawn_scenes`` reads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--per-scene", type=int, default=3, help="questions about each, at most")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    try:
        count = write_scenes(FOLDER, asked.scenes, asked.per_scene, asked.seed)
    except ValueError as error:
        parser.error(str(error))
    print(f"{count} questions about {asked.scenes} scenes: {FOLDER}")


if __name__ == "__main__":
    main()
