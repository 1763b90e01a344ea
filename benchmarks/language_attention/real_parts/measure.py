# SPDX-License-Identifier: Apache-2.0
"""Measures the trained model: ``python -m benchmarks.language_attention.real_parts.measure``.

Which layer's words find the thing that is asked for, and how many answers stay right. Kept tokens
keep their positions. The measurements are written set by set into ``results.json`` and the README.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.accuracy.layer_attention import attention_of, times_ratio
from benchmarks.accuracy.statistics import paired
from benchmarks.language_attention.real_parts.model import PATCH, RealVLM, run
from benchmarks.language_attention.real_parts.scenes import Asked, Pixels, Thing, questions, scene
from benchmarks.language_attention.real_parts.train import OUTPUT
from benchmarks.measuring.report import say, table
from flashvlm_vllm.selection import LanguageAttention, VisualTokens, run_selector
from flashvlm_vllm.selection.llm_attention import attended_scores, select_attended
from flashvlm_vllm.selection.neighbours import checkerboard
from flashvlm_vllm.selection.registry import find_selector
from scripts.pages import with_part

FOLDER: Final = Path(__file__).parent
SIDE: Final = 224
COLUMNS: Final = SIDE // PATCH
PLACES: Final = torch.cartesian_prod(torch.arange(COLUMNS), torch.arange(COLUMNS))
BUDGETS: Final = (44, 22, 11)
"""22.2, 11.1 and 5.6 % of 196."""
SELECTORS: Final = ("llm-attention", "flashvlm-2", "flashvlm", "vispruner", "random")
SETS: Final = {"large": (64, 100, 11), "small": (36, 52, 12)}
"""Pixels of the smallest and the largest thing, and a seed."""
KINDS: Final = ("exist", "what", "where")
PAIRS: Final = (
    *(("llm-attention", other) for other in SELECTORS[1:]),
    *(("flashvlm-2", other) for other in ("flashvlm", "vispruner")),
)
"""Selectors that are compared."""
GROUPS: Final = {"layers 9 and 10": range(8, 10), "all layers": range(30)}
"""Layers, from 0, that are added up for `select_attended`."""


@dataclass
class Found:
    """Measurements of one set of questions."""

    kinds: str = ""
    """Index in `KINDS`, question by question."""
    right: dict[str, dict[str, str]] = field(default_factory=dict)
    """By row and budget: "1" for a right answer, "0" for a wrong one."""
    areas: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """By row and kind: area under the ROC curve of "is a patch of the thing in question"."""

    def mark(self, row: str, budget: int, is_right: bool) -> None:
        """Add an answer."""
        marks = self.right.setdefault(row, {})
        marks[str(budget)] = marks.get(str(budget), "") + str(int(is_right))

    def area(self, row: str, kind: str, scores: Tensor, thing: Thing) -> None:
        """Add the area under the curve of a score."""
        inside = patches_of(thing)
        pairs = scores[inside][:, None] - scores[~inside]
        value = ((pairs > 0).float() + 0.5 * (pairs == 0).float()).mean().item()
        self.areas.setdefault(row, {}).setdefault(kind, []).append(round(value, 4))


def patches_of(thing: Thing) -> Tensor:
    """Return which patches have their middle in the thing's square, (N,) bool."""
    y, x = ((PLACES + 0.5) * PATCH).T
    half = thing.size / 2
    inside: Tensor = ((x - thing.x).abs() <= half) & ((y - thing.y).abs() <= half)
    return inside


def drawn(smallest: int, largest: int, seed: int, count: int) -> Iterator[tuple[Pixels, Asked]]:
    """Yield pictures of three to five things with one question each, the kinds in turn."""
    rng = random.Random(seed)
    number = 0
    while number < count:
        image, things = scene(rng, SIDE, rng.randint(3, 5), smallest, largest)
        kind, is_there = KINDS[number % len(KINDS)], number % 2 == 0
        for asked in questions(rng, SIDE, things):
            if asked.kind == kind and (kind != "exist" or (asked.answer == "yes") == is_there):
                yield image, asked
                number += 1
                break


@torch.inference_mode()
def is_right(model: RealVLM, projected: Tensor, kept: Tensor, asked: Asked) -> bool:
    """Return whether greedy decoding gives the answer, from the kept tokens in their places."""
    prompt, said = model.question(asked.text) + model.template, model.ids(asked.answer) + model.end
    words = model.words(prompt + said[:-1])
    first = len(model.before)
    behind = first + len(PLACES) + torch.arange(len(words))
    positions = torch.cat([torch.arange(first), first + kept, behind])
    whole = torch.cat([model.words(model.before), projected[kept], words])
    hidden = run(model, whole, positions)[-len(said) :]
    best: list[int] = model.language.lm_head(hidden).argmax(dim=1).tolist()
    return bool(best == said)


@torch.inference_mode()
def measure(model: RealVLM, name: str, count: int) -> Found:
    """Measure a set of questions."""
    found = Found()
    llama = model.language.model
    few = SimpleNamespace(layers=llama.layers[:3], rotary_emb=llama.rotary_emb)
    for number, (image, asked) in enumerate(drawn(*SETS[name], count)):
        found.kinds += str(KINDS.index(asked.kind))
        (features,), (saliency,) = model.look([image])
        projected = model.project(features)
        question = model.question(asked.text)
        text, before = model.words(question), model.words(model.before)
        after = torch.cat([text, model.words(model.template)])
        whole = torch.arange(len(PLACES))
        found.mark("unpruned", len(PLACES), is_right(model, projected, whole, asked))
        layers = attention_of(few, before, projected, after, 1, checkerboard(PLACES))
        served = torch.stack([times_ratio(own.read).mean(dim=0) for own in layers[1:3]])
        attention = LanguageAttention(layers[1].weights.mean(dim=0), served, len(text))
        seen = (projected, features, saliency, text, features[:, None], PLACES, number)
        for selector in SELECTORS:
            for budget in BUDGETS:
                tokens = VisualTokens(budget, *seen, attention=attention)
                kept = run_selector(selector, find_selector(selector), tokens, trusted=True).spots
                found.mark(selector, budget, is_right(model, projected, kept.sort().values, asked))
        reads = [
            times_ratio(own.read).mean(dim=0)
            for own in attention_of(llama, before, projected, after)
        ]
        for row, numbers in GROUPS.items():
            read = torch.stack([reads[layer] for layer in numbers])
            kept = select_attended(read, BUDGETS[1], features, PLACES)
            found.mark(row, BUDGETS[1], is_right(model, projected, kept, asked))
        if asked.about is not None:
            rows = {f"layer {layer + 1}": reads[layer][None] for layer in range(len(reads))}
            rows["llm-attention"] = served
            rows |= {row: torch.stack([reads[n] for n in each]) for row, each in GROUPS.items()}
            for row, read in rows.items():
                found.area(row, asked.kind, attended_scores(read, PLACES), asked.about)
            found.area("saliency", asked.kind, saliency, asked.about)
        if number % 10 == 9:
            say(f"{name}: {number + 1} of {count}")
    return found


def shares(marks: str, kinds: str) -> list[float]:
    """Return the share of right answers, then by kind."""
    by_kind = [
        [mark for mark, kind in zip(marks, kinds, strict=True) if kind == str(number)]
        for number in range(len(KINDS))
    ]
    return [each.count("1") / len(each) for each in (list(marks), *by_kind)]


def answers_table(sets: dict[str, Any]) -> str:
    """Return the right answers of both sets together, by row."""
    kinds = "".join(found["kinds"] for found in sets.values())
    first, *others = sets.values()
    rows = []
    for row, budgets in first["right"].items():
        for budget, marks in budgets.items():
            every = marks + "".join(other["right"][row][budget] for other in others)
            rows.append((row, budget, *(f"{share:.2f}" for share in shares(every, kinds))))
    return table(("tokens chosen by", "of 196", "all", *KINDS), rows)


def layers_table(sets: dict[str, Any]) -> str:
    """Return the areas under the curve of both sets together, by row."""
    rows = []
    for row in next(iter(sets.values()))["areas"]:
        every = {
            kind: [value for found in sets.values() for value in found["areas"][row][kind]]
            for kind in KINDS
        }
        rows.append((row, *(f"{sum(own) / len(own):.2f}" for own in every.values())))
    return table(("scores of", *KINDS), rows)


def compared(sets: dict[str, Any], first: str, second: str, budget: int) -> str:
    """Return a paired comparison of two rows on both sets."""
    marks = [
        [mark == "1" for found in sets.values() for mark in found["right"][row][str(budget)]]
        for row in (first, second)
    ]
    own = paired(*marks)
    return f"{own.difference:+.3f}, p {f'= {own.p:.3f}' if own.p >= 0.001 else '< 0.001'}"


def main() -> None:
    """Measure; write results and tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=120, help="of each set")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = RealVLM(torch.float32).eval()
    model.load(OUTPUT)
    model.merge()
    path = FOLDER / "results.json"
    for name in asked.sets:
        found = measure(model, name, asked.questions)
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, name: vars(found)}) + "\n")
    page = FOLDER / "README.md"
    page.write_text(with_tables(page.read_text(), json.loads(path.read_text())))


def with_tables(page: str, sets: dict[str, Any]) -> str:
    """Return the README with the tables of these results."""
    lines = [
        f"* `{first}` against `{second}` at {budget} tokens: "
        f"{compared(sets, first, second, budget)}."
        for first, second in PAIRS
        for budget in BUDGETS
    ]
    page = with_part(page, "answers", answers_table(sets))
    page = with_part(page, "layers", layers_table(sets))
    return with_part(page, "differences", "\n".join(lines))


if __name__ == "__main__":
    main()
