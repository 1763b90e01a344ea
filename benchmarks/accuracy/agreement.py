# SPDX-License-Identifier: Apache-2.0
"""Compares server and Transformers answer by answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.accuracy.reference import Reference, Seen
from benchmarks.accuracy.rows import by_selector, prepare
from benchmarks.accuracy.served import Asker
from benchmarks.accuracy.sets import plain, urls_of
from flashvlm_vllm.selection import run_selector
from flashvlm_vllm.selection.registry import BUILT_IN, find_selector

QUESTIONS: Final = 60
SEED: Final = 9
BUDGET: Final = 64


def agreement(asker: Asker, trace: Path, reference: Reference) -> dict[str, Any]:
    """Compare answers to some questions, with every selector.

    Returns:
        per selector, of ``questions``: ``answers``, how many are the same; and for selectors that
        choose, ``kept``, how many kept sets are the same when Transformers' features decide, and
        ``answers_given_kept``, how many answers are when both keep what the server kept, at the
        same positions. Rounding differs between the two, and Algorithm 1 makes other choices of
        it. Selectors that merge are asked with positions closed: Transformers' side merges without
        places.

    """
    items = plain(QUESTIONS, SEED)
    pictures = [urls_of(item) for item in items]
    prepared = prepare(reference, items)
    found: dict[str, Any] = {"questions": QUESTIONS, "budget": BUDGET}
    for name, selector in BUILT_IN.items():
        served, ours, given, same = [], [], [], 0
        choose = by_selector(name)
        for item, urls, looks, text in zip(
            items, pictures, prepared.looks, prepared.texts, strict=True
        ):
            # One at a time, so that the last line of the trace is this question's.
            positions = "closed" if selector.merges else "kept"
            served += asker.answers([item], [urls], BUDGET, name, positions)
            seen, asked = looks[0], [item.question.text]
            kept = json.loads(trace.read_text().splitlines()[-1])["kept"]
            if selector.merges:
                ours += reference.answer([choose(reference, item, seen, text, 0, BUDGET)], asked)
                continue
            chosen = indices_of(name, reference, seen, text, item.frames[0].seed)
            ours += reference.answer([seen.projected[chosen]], asked, [chosen])
            indices = torch.tensor(kept)
            given += reference.answer([seen.projected[indices]], asked, [indices])
            same += bool(torch.equal(chosen, indices))
        row: dict[str, int] = {"answers": sum(a == b for a, b in zip(served, ours, strict=True))}
        if not selector.merges:
            row["kept"] = same
            row["answers_given_kept"] = sum(a == b for a, b in zip(served, given, strict=True))
        found[name] = row
    return found


def indices_of(name: str, reference: Reference, seen: Seen, text: Tensor, seed: int) -> Tensor:
    """Return the tokens that a selector keeps from Transformers' features."""
    selector = find_selector(name)
    attention = reference.attention(selector, seen, text)
    tokens = seen.tokens(BUDGET, text, seed, attention)
    chosen = run_selector(name, selector, tokens, trusted=True)
    assert chosen.indices is not None
    return chosen.indices
