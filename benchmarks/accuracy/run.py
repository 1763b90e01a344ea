# SPDX-License-Identifier: Apache-2.0
"""Accuracy of every selector: ``python -m benchmarks.accuracy.run`` (hours), or some ``--parts``.

Each part writes its results into ``results.json`` at once. A run that ends early loses nothing, and
a later one can measure the rest. A run of ``served`` or ``agreement`` and a run of other parts may
go on at the same time. The tables are made from that file.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.accuracy import rows
from benchmarks.accuracy.agreement import agreement
from benchmarks.accuracy.figures import write_report
from benchmarks.accuracy.grounding import above_the_floor, alignment, measure
from benchmarks.accuracy.reference import Reference
from benchmarks.accuracy.served import Asker
from benchmarks.accuracy.sets import FRAMES, Item, clips, plain, stress, urls_of
from benchmarks.measuring.folders import committed, scratch
from flashvlm_vllm.selection.registry import BUILT_IN
from small_vlm import WEIGHTS
from small_vlm.architecture import VISUAL_TOKENS
from testing.server import Server

SCRATCH: Final = scratch("accuracy")
BUDGETS: Final = (128, 64, 32)
"""22.2, 11.1 and 5.6 % of 576."""
SETS: Final[dict[str, Callable[[int, int], list[Item]]]] = {
    "plain": plain,
    "stress": stress,
    "clips": clips,
}
COUNTS: Final = {"plain": 600, "stress": 800, "clips": 240}
SEEDS: Final = {"plain": 1, "stress": 2, "clips": 3}
POSITIONS: Final = ("kept", "closed")
"""Of kept tokens, as requests ask for them."""
VARIANTS: Final[dict[str, dict[str, rows.Choose]]] = {
    "defaults": rows.REPEATED,
    "ablations": rows.ABLATED,
    "sweeps": rows.SWEPT,
    "readings": rows.READINGS,
    "parts-of-flashvlm-2": rows.PARTS_OF_2,
}
"""Rows of the images by part."""
SERVED: Final = ("served", "agreement")
UNSERVED: Final = ("reference", "inside", *VARIANTS, "positions", "grounding")
PARTS: Final = SERVED + UNSERVED


class Results:
    """The results so far, in a file that another run may write, too."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """Return everything that is in the file."""
        found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        return found

    def put(self, value: object, *keys: str) -> None:
        """Write one value, under nested keys; all else stays as the file has it."""
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            found = self.read()
            inner = found
            for key in keys[:-1]:
                inner = inner.setdefault(key, {})
            inner[keys[-1]] = value
            written = self.path.with_suffix(".new")
            written.write_text(json.dumps(found, indent=1) + "\n")
            written.replace(self.path)
        finally:
            os.close(folder)

    def record(self, name: str, row: str, items: list[Item], answers: list[str]) -> None:
        """Add which answers of a row are right, one character each."""
        marks = "".join(
            "1" if said == item.question.answer else "0"
            for said, item in zip(answers, items, strict=True)
        )
        share = marks.count("1") / len(marks)
        print(f"{time.strftime('%H:%M:%S')} {name:7} {row:45} {share:.3f}", flush=True)
        self.put(marks, "right", name, row)


def main() -> int:
    """Run the chosen parts and write the report."""
    parser = argparse.ArgumentParser(prog="benchmarks.accuracy.run", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--selectors", nargs="+", choices=BUILT_IN, default=list(BUILT_IN))
    parser.add_argument("--positions", nargs="+", choices=POSITIONS, default=list(POSITIONS))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--model", type=Path, default=WEIGHTS)
    parser.add_argument("--output", type=Path, default=committed("accuracy"))
    parser.add_argument("--questions", type=float, default=1.0, help="share of each set's size")
    parser.add_argument("--report-only", action="store_true", help="only write the tables again")
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    results = Results(asked.output / "results.json")
    if not asked.report_only:
        run(asked, results)
    write_report(results.read(), asked.output)
    return 0


def run(asked: argparse.Namespace, results: Results) -> None:
    """Fill ``results``."""
    sets = {
        name: SETS[name](round(COUNTS[name] * asked.questions), SEEDS[name]) for name in asked.sets
    }
    about = {
        "weights": hashlib.sha256((asked.model / "model.safetensors").read_bytes()).hexdigest(),
        "budgets": list(BUDGETS),
        "visual_tokens": VISUAL_TOKENS,
        "frames": FRAMES,
        "seeds": SEEDS,
        "torch": torch.__version__,
    }
    before = results.read().get("about")
    if before is not None and before["weights"] != about["weights"]:
        sys.exit(f"{results.path} is of other weights; remove it or choose another --output")
    results.put(about, "about")
    for name, items in sets.items():
        asks = {
            "families": [item.question.family for item in items],
            "answers": [item.question.answer for item in items],
        }
        if results.read().get("sets", {}).get(name, asks) != asks:
            sys.exit(f"{results.path} has other {name} questions; choose another --output")
        results.put(asks, "sets", name)
    if set(SERVED) & set(asked.parts):
        with serving(asked.model, SCRATCH) as (asker, trace):
            if "agreement" in asked.parts:
                compared = agreement(asker, trace, Reference(asked.model))
                results.put(compared, "agreement")
            if "served" in asked.parts:
                ask_server(asker, sets, results, asked.selectors, asked.positions)
    if set(UNSERVED) & set(asked.parts):
        ask_reference(asked, sets, results)


@contextmanager
def serving(model: Path, scratch: Path) -> Iterator[tuple[Asker, Path]]:
    """Run a server for the block."""
    trace = scratch / "trace"
    trace.mkdir(parents=True, exist_ok=True)
    for left in trace.iterdir():
        left.unlink()
    arguments = ("--plugins", "flashvlm", "--max-model-len", "4096", "--max-num-seqs", "16")
    limits = ("--limit-mm-per-prompt", json.dumps({"image": FRAMES}))
    environment = {"FLASHVLM_TRACE_DIR": str(trace), "VLLM_LOGGING_LEVEL": "WARNING"}
    server = Server(
        model, (*arguments, *limits), log=scratch / "server.log", environment=environment
    )
    with server:
        yield Asker(server.url, server.model), trace / "rank-0.jsonl"


def ask_server(
    asker: Asker,
    sets: dict[str, list[Item]],
    results: Results,
    selectors: list[str],
    positions: list[str],
) -> None:
    """Fill the rows of the server's own selectors, positions kept and closed, and the unpruned."""
    for name, items in sets.items():
        pictures = [urls_of(item) for item in items]
        frames = len(items[0].frames)
        results.record(name, "unpruned", items, asker.answers(items, pictures, None, "flashvlm"))
        for budget in BUDGETS:
            for selector in selectors:
                for each in positions:
                    row = rows.closed(selector) if each == "closed" else selector
                    tokens = budget * frames
                    answers = asker.answers(items, pictures, tokens, selector, each)
                    results.record(name, f"{row}@{budget}", items, answers)


def ask_reference(asked: argparse.Namespace, sets: dict[str, list[Item]], results: Results) -> None:
    """Fill the rows that need no server."""
    reference = Reference(asked.model)
    for name, items in sets.items():
        prepared = rows.prepare(reference, items)
        answered = answers_of(asked.parts, reference, prepared, is_clip=name == "clips")
        for row, answers in answered:
            results.record(name, row, items, answers)
        if "grounding" in asked.parts and name != "clips":
            results.put(measure(reference, prepared, BUDGETS), "grounding", name)
            results.put(alignment(reference, prepared), "alignment", name)
            results.put(above_the_floor(prepared), "above_the_floor", name)


def answers_of(
    parts: list[str], reference: Reference, prepared: rows.Prepared, is_clip: bool
) -> Iterator[tuple[str, list[str]]]:
    """Yield each row's name and its answers."""
    frames = len(prepared.looks[0])
    boundary: dict[str, rows.Choose] = {}
    whole: dict[str, rows.Answer] = {}
    if "reference" in parts:
        yield "unpruned (Transformers)", rows.answers(reference, prepared, rows.unpruned, 0)
        boundary["oracle"] = rows.oracle
        whole["downscale"] = rows.downscaled
    if "inside" in parts:
        whole["tome"] = rows.merged_in_the_tower
        whole["fastv"] = rows.inside_the_language_model("fastv")
        whole["sparsevlm"] = rows.inside_the_language_model("sparsevlm")
    if not is_clip:
        for part, variants in VARIANTS.items():
            boundary |= variants if part in parts else {}
        if "positions" in parts:
            whole |= rows.POSITIONS_KEPT
    for row, choose in boundary.items():
        for budget in BUDGETS:
            yield f"{row}@{budget}", rows.answers(reference, prepared, choose, budget * frames)
    for row, answer in whole.items():
        for budget in BUDGETS:
            tokens = max(budget, rows.LEAST.get(row, 1)) * frames
            yield f"{row}@{budget}", answer(reference, prepared, tokens)


if __name__ == "__main__":
    sys.exit(main())
