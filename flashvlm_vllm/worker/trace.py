# SPDX-License-Identifier: Apache-2.0
"""Writes which tokens were kept, for tests, the demo and debugging. Off by default."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

DIRECTORY = "FLASHVLM_TRACE_DIR"


def is_tracing() -> bool:
    """Return whether ``FLASHVLM_TRACE_DIR`` names a directory to write to."""
    return bool(os.environ.get(DIRECTORY))


def record(
    rank: int, totals: Sequence[int], kept: Sequence[Tensor | None], queries: Sequence[Tensor]
) -> None:
    """Append one JSON line per item to ``rank-<rank>.jsonl``.

    A line holds ``total``, ``kept`` (ascending indices; null where tokens were merged) and
    ``query`` (token ids of the words that guide the selection). Reading them synchronizes with the
    device, so do not trace in production.
    """
    path = Path(os.environ[DIRECTORY]) / f"rank-{rank}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        for total, indices, query in zip(totals, kept, queries, strict=True):
            patches = None if indices is None else indices.tolist()
            line = {"total": total, "kept": patches, "query": query.tolist()}
            file.write(json.dumps(line) + "\n")
