# SPDX-License-Identifier: Apache-2.0
"""Measures every variant on development questions: ``python -m benchmarks.language_attention.run``.

The questions are drawn with other seeds than all test sets. Results are written variant by
variant; a later run continues, unless the code has changed: then it starts again.
``--model`` names another trained model; its results go to a file of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.accuracy.reference import ANSWER_TOKENS, Reference, Seen
from benchmarks.accuracy.sets import Item, nearest_patches, plain, stress
from benchmarks.language_attention import described
from benchmarks.language_attention.figures import write_report
from benchmarks.language_attention.observed import Observed
from benchmarks.language_attention.variants import Variant, variants
from benchmarks.measuring.commit import CODE
from benchmarks.measuring.folders import ROOT, committed
from flashvlm_vllm.selection import run_selector
from flashvlm_vllm.selection.registry import find_selector
from small_vlm import WEIGHTS
from small_vlm.architecture import VISUAL_TOKENS
from small_vlm.language import DESCRIBE, Question

SETS: Final = {"plain": (plain, 401), "stress": (stress, 402)}
"""Development sets and their seeds; those of the tests are 1 to 3."""
BUDGETS: Final = (128, 64, 32)
QUESTIONS: Final = 300
DESCRIBED: Final = ("described", 403)
"""A set of whole pictures to describe, and its seed; a fifth as many as questions of a set."""
BATCH: Final = 32
COMPARED: Final = ("vispruner", "flashvlm", "flashvlm-2")
GROUPED: Final = 6
"""Variants whose kept tokens are found in one pass over the pictures."""


def main() -> int:
    """Measure what is missing, and write the report."""
    parser = argparse.ArgumentParser(prog="benchmarks.language_attention.run", description=__doc__)
    parser.add_argument("--model", type=Path, default=WEIGHTS)
    parser.add_argument("--name", default="results", help="of the results file")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="of each set")
    parser.add_argument("--groups", nargs="+", help="groups of variants; default: all")
    parser.add_argument("--report-only", action="store_true")
    asked = parser.parse_args()
    folder = committed("language_attention")
    if not asked.report_only:
        measure(asked, folder / f"{asked.name}.json")
    write_report(folder)
    return 0


def measure(asked: argparse.Namespace, path: Path) -> None:
    """Fill a results file."""
    torch.set_num_threads(1)
    reference = Reference(asked.model)
    config = reference.model.config.text_config
    about = {
        "weights": digest([asked.model / "model.safetensors"]),
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "questions": asked.questions,
        "budgets": list(BUDGETS),
    }
    code = sorted(file for folder in CODE for file in (ROOT / folder).rglob("*.py"))
    found = continued(path, {**about, "code": digest(code)})
    tried = [
        each
        for each in variants(config.num_hidden_layers)
        if asked.groups is None or each.group in asked.groups
    ]
    sets = {
        name: Pictures(reference, draw(asked.questions, seed))
        for name, (draw, seed) in SETS.items()
    }
    sets[DESCRIBED[0]] = Described(reference, asked.questions // 5)
    for name, pictures in sets.items():
        right = found["right"].setdefault(name, {})
        missing = [each for each in tried if f"{each.group}: {each.name}" not in right]
        if not missing and "unpruned" in right:
            continue
        pictures.encode()
        if "unpruned" not in right:
            for row, kept in pictures.compared():
                right[row] = pictures.marks(kept)
                _save(found, path, name, row)
        for start in range(0, len(missing), GROUPED):
            group = missing[start : start + GROUPED]
            for variant, kept in zip(group, pictures.kept(group), strict=True):
                row = f"{variant.group}: {variant.name}"
                right[row] = pictures.marks(kept)
                _save(found, path, name, row)


def digest(files: Iterable[Path]) -> str:
    """Return the SHA-256 of the files' contents, one after another."""
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()


def continued(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Return the results of an earlier run, or none if they are of other code.

    Results of another model or other questions are not replaced: the process exits.
    """
    begun: dict[str, Any] = {"about": about, "right": {}}
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else begun
    if found["about"] | {"code": about["code"]} != about:
        sys.exit(f"{path.name} is of other weights or questions; remove it or use another --name")
    return found if found["about"] == about else begun


def _save(found: dict[str, Any], path: Path, name: str, row: str) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n")
    shares = [marks.count("1") / len(marks) for marks in found["right"][name][row].values()]
    print(time.strftime("%H:%M:%S"), f"{name:7} {row:75}", *(f"{each:.3f}" for each in shares),
          flush=True)  # fmt: skip


Kept = dict[int, list[Tensor]]
"""Kept tokens of every picture, by budget."""


class Pictures:
    """A set of questions."""

    def __init__(self, reference: Reference, items: list[Item]) -> None:
        self.reference, self.items = reference, items
        self.texts = [item.question.text for item in items]
        self.seen: list[Seen] = []

    def encode(self) -> None:
        """Run the tower on every picture."""
        self.seen = [self.reference.look(item.pictures())[0] for item in self.items]

    def observed(self) -> Iterable[Observed]:
        """Yield what the language model attends to, question by question."""
        for seen, text in zip(self.seen, self.texts, strict=True):
            yield Observed(self.reference, seen, text)

    def kept(self, tried: list[Variant]) -> list[Kept]:
        """Return what each variant keeps."""
        every: list[Kept] = [{budget: [] for budget in BUDGETS} for _ in tried]
        for observed in self.observed():
            for variant, kept in zip(tried, every, strict=True):
                for budget in BUDGETS:
                    kept[budget].append(variant.kept(observed, budget))
        return every

    def compared(self) -> Iterable[tuple[str, Kept]]:
        """Yield what the unpruned model, the oracle and other selectors keep."""
        yield "unpruned", {VISUAL_TOKENS: [torch.arange(VISUAL_TOKENS)] * len(self.items)}
        yield (
            "oracle",
            {budget: [self.nearest(item, budget) for item in self.items] for budget in BUDGETS},
        )
        for name in COMPARED:
            selector = find_selector(name)
            kept: Kept = {}
            for budget in BUDGETS:
                kept[budget] = []
                for seen, text in zip(self.seen, self.texts, strict=True):
                    tokens = seen.tokens(budget, self.reference.words(text))
                    chosen = run_selector(name, selector, tokens, trusted=True)
                    kept[budget].append(chosen.spots)
            yield name, kept

    def marks(self, kept: Kept) -> dict[str, str]:
        """Return which answers are right with these tokens at their places, by budget."""
        return {str(budget): self._marks(own) for budget, own in kept.items()}

    def nearest(self, item: Item, budget: int) -> Tensor:
        """Return the tokens nearest to the object in question, evenly spaced ones without one."""
        if item.about is None:
            return (2 * torch.arange(budget) + 1) * VISUAL_TOKENS // (2 * budget)
        return torch.tensor(nearest_patches(item.about, budget))

    def _marks(self, kept: list[Tensor]) -> str:
        said: list[str] = []
        for start in range(0, len(kept), BATCH):
            rows = slice(start, start + BATCH)
            visual = [
                seen.projected[own] for seen, own in zip(self.seen[rows], kept[rows], strict=True)
            ]
            said += self.reference.answer(visual, self.texts[rows], kept[rows], most=self.most)
        every = zip(said, self.items, strict=True)
        return "".join(self.mark(answer, item) for answer, item in every)

    most = ANSWER_TOKENS

    def mark(self, answer: str, item: Item) -> str:
        """Return 1 for a right answer, 0 for a wrong one."""
        return "1" if answer == item.question.answer else "0"


class Described(Pictures):
    """Scenes to describe; one mark for each object."""

    most = described.ANSWER_TOKENS

    def __init__(self, reference: Reference, count: int) -> None:
        question = Question("exist", DESCRIBE, "", None)
        scenes = described.scenes(count, DESCRIBED[1])
        super().__init__(reference, [Item((scene,), question, None) for scene in scenes])

    def mark(self, answer: str, item: Item) -> str:
        """Return 1 for each object that is named, 0 for the others."""
        return "".join("01"[each] for each in described.named(item.frames[0], answer))


if __name__ == "__main__":
    sys.exit(main())
