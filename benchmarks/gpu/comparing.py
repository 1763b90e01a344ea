# SPDX-License-Identifier: Apache-2.0
"""Compares engines: the plugin with stock, chunked prefill with whole prompts.

Every engine writes ``<name>.answers.json`` into the scratch folder. Two engines can be compared
when both files exist, so this runs after every step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu import keys
from benchmarks.gpu.results import Figure

FLOAT32: Final = "torch.float32"
ENCODERS: Final = ("encoder-graphs-v2", "encoder-graphs-v1", "encoder-compiled-v2")
"""Engines whose vision encoder has CUDA graphs or is compiled."""
AGAINST_STOCK: Final = {
    "v2-bf16-graphs": "stock-v2",
    "v1-bf16-graphs": "stock-v1",
    **{name: f"stock-{name}" for name in ENCODERS},
}
CHUNKS: Final = ("v2-chunks", "v1-chunks")
WHOLE: Final = ("v2-float32-eager", "v1-bf16-graphs")
"""Engines that chunks are compared with: the first that ran in float32 (on a CPU all do)."""


def answers_file(folder: Path, engine: str) -> Path:
    """Return the file with the answers of an engine."""
    return folder / f"{engine}.answers.json"


def compare_answers(folder: Path) -> dict[str, Figure]:
    """Compare all pairs of engines with answers."""
    found = {
        path.name.removesuffix(".answers.json"): json.loads(path.read_text())
        for path in folder.glob("*.answers.json")
    }
    compared: dict[str, Figure] = {}
    for plugin, stock in AGAINST_STOCK.items():
        if plugin in found and stock in found:
            figure = against_stock(found[plugin]["alone"], found[stock]["alone"])
            compared[keys.of(plugin, keys.EQUALS_STOCK)] = replace(figure, step=plugin)
    whole = [found[name] for name in WHOLE if found.get(name, {}).get("dtype") == FLOAT32]
    for name in CHUNKS:
        if name in found and whole:
            figure = against_whole(found[name], whole[0])
            compared[keys.of(name, keys.CHUNKED)] = replace(figure, step=name)
    return compared


def against_stock(ours: list[Mapping[str, Any]], stock: list[Mapping[str, Any]]) -> Figure:
    """Compare ids and log-probabilities of the same requests, sent one at a time."""
    pairs = list(zip(ours, stock, strict=True))
    same_ids = sum(one["ids"] == other["ids"] for one, other in pairs)
    largest = max(
        abs(a - b)
        for one, other in pairs
        for a, b in zip(one["logprobs"], other["logprobs"], strict=False)
    )
    seen = (
        f"{same_ids} of {len(pairs)} answers the same, log-probabilities at most {largest:g} apart"
    )
    return Figure(same_ids == len(pairs) and largest == 0, conditions=seen)


def against_whole(chunks: Mapping[str, Any], whole: Mapping[str, Any]) -> Figure:
    """Compare answers to prompts in chunks with those of prompts that fit into one step."""
    pairs = [
        pair
        for budget, texts in chunks["answers"].items()
        for pair in zip(texts, whole["answers"][budget], strict=False)
    ]
    same = sum(one == other for one, other in pairs)
    seen = f"{same} of {len(pairs)} answers the same, chunks of {chunks['chunk']} tokens"
    return Figure(same == len(pairs), conditions=seen)
