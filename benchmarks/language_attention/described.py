# SPDX-License-Identifier: Apache-2.0
"""Descriptions of whole pictures, for which a selector cannot know what is asked for.

The small VLM describes drawn scenes with the tokens that each selector keeps, on Transformers.
``python -m benchmarks.language_attention.described`` in the repository root.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import chain
from typing import Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy.reference import Reference, Seen
from benchmarks.accuracy.sets import FIRST_TEST_SEED
from benchmarks.measuring.folders import committed
from benchmarks.measuring.report import say, table
from flashvlm_vllm.selection import run_selector
from flashvlm_vllm.selection.registry import find_selector
from scripts.pages import with_part
from small_vlm import WEIGHTS
from small_vlm.language import DESCRIBE, phrase
from small_vlm.scenes import Scene, draw, sample_scene

SEED: Final = 9
SCENES: Final = 120
BUDGETS: Final = (128, 64, 32)
SELECTORS: Final = ("llm-attention", "flashvlm-2", "flashvlm", "vispruner", "divprune")
ANSWER_TOKENS: Final = 48
BATCH: Final = 24


def scenes(count: int, seed: int) -> list[Scene]:
    """Draw scenes of three to eight objects."""
    rng = np.random.default_rng([FIRST_TEST_SEED, seed])
    return [sample_scene(rng, int(rng.integers(3, 9))) for _ in range(count)]


def named(scene: Scene, said: str) -> list[bool]:
    """Return which of a scene's objects a description names, with their place."""
    entries = [each.strip(" .") for each in said.split(",")]
    return [phrase(thing) in entries for thing in scene.things]


def described(reference: Reference, seen: Sequence[Seen], kept: Sequence[Tensor]) -> list[str]:
    """Describe every picture from some of its tokens, with positions kept."""
    said: list[str] = []
    for start in range(0, len(seen), BATCH):
        rows = slice(start, start + BATCH)
        visual = [own.projected[tokens] for own, tokens in zip(seen[rows], kept[rows], strict=True)]
        asked = [DESCRIBE] * len(visual)
        said += reference.answer(visual, asked, kept[rows], most=ANSWER_TOKENS)
    return said


def main() -> int:
    """Measure; write results and table."""
    torch.set_num_threads(1)
    reference, drawn = Reference(WEIGHTS), scenes(SCENES, SEED)
    seen = [reference.look([draw(scene)])[0] for scene in drawn]
    text = reference.words(DESCRIBE)

    def share(kept: Sequence[Tensor]) -> float:
        said = described(reference, seen, kept)
        marks = chain(*(named(*each) for each in zip(drawn, said, strict=True)))
        return float(np.mean(list(marks)))

    whole = share([torch.arange(len(own.projected)) for own in seen])
    found: dict[str, dict[str, float]] = {}
    for name in SELECTORS:
        selector = find_selector(name)
        for budget in BUDGETS:
            kept = []
            for own in seen:
                attention = reference.attention(selector, own, text)
                tokens = own.tokens(budget, text, attention=attention)
                kept.append(run_selector(name, selector, tokens, trusted=True).spots)
            found.setdefault(name, {})[str(budget)] = share(kept)
            say(f"{name}, {budget} tokens: {found[name][str(budget)]:.3f}")
    folder = committed("language_attention")
    results = {"scenes": SCENES, "unpruned": whole, "named": found}
    (folder / "described.json").write_text(json.dumps(results, indent=1) + "\n")
    head = ("objects named, unpruned {whole:.3f}", *(f"{budget} tokens" for budget in BUDGETS))
    rows = [
        (f"`{name}`", *(f"{own[str(budget)]:.3f}" for budget in BUDGETS))
        for name, own in found.items()
    ]
    page = folder / "README.md"
    shown = table([head[0].format(whole=whole), *head[1:]], rows)
    page.write_text(with_part(page.read_text(), "described", shown))
    print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
