# SPDX-License-Identifier: Apache-2.0
"""Names of the figures in ``results.json`` that targets, pages and several steps use."""

from __future__ import annotations

from typing import Final

CLIENTS: Final = (1, 8, 32)

GPU_TESTS: Final = "gpu-tests: all tests pass"
"""Those of ``tests/gpu``."""
SELECTION_ONE: Final = "selection 576 -> 64, batch 1"
SELECTION_32: Final = "selection 576 -> 64, batch 32"
SELECTION_CROPS: Final = "selection 2880 -> 640, five crops"
SELECTION_LIST: Final = "selection 2880 -> 640, one list"
NO_SYNC: Final = "selection without host synchronisation"
PUBLISHED: Final = "published loop 576 -> 64"
VISPRUNER: Final = "VisPruner 576 -> 64"

# Of an engine on the small VLM.
RUNNER: Final = "model runner"
COUNTS_EXACT: Final = "exact token counts without a budget and at 128, 64, 32"
MIXED_EXACT: Final = "exact token counts with mixed budgets in one batch"
PREFIX_CACHE: Final = "prefix cache with two questions"
ACCURACY_AS_CPU: Final = "accuracy within the CPU's 95 % intervals"
EQUALS_STOCK: Final = "same ids and log-probabilities as stock without a budget"
CHUNKED: Final = "chunked prefill gives the same answers"
# Of an engine whose vision encoder has CUDA graphs or is compiled.
WHOLE_ENCODED: Final = "items without a budget use them"
PRUNED_ENCODED: Final = "items with a budget do not"
# Of engine tests that run as a step.
TESTS: Final = "all tests pass"

SCHEDULED: Final = "scheduled to first token"
WHOLE: Final = "whole request"
SECOND_TTFT: Final = "second question: TTFT as share of the first's"
SECOND_ENCODED: Final = "second question: images encoded again"


def tower_share(images: int) -> str:
    """Selection as a share of a CLIP-L/336 tower's time."""
    return f"selection as share of the CLIP-L/336 tower, batch {images}"


def of(step: str, what: str) -> str:
    """Name a figure that several steps have."""
    return f"{step}: {what}"


def accuracy(budget: int | None) -> str:
    """Share of correct answers."""
    return f"correct answers, {'no budget' if budget is None else f'{budget} tokens'}"


def clients_text(clients: int) -> str:
    """Return a number of clients in words."""
    return f"{clients} client{'s' if clients > 1 else ''}"


def throughput(column: str, clients: int) -> str:
    """Requests per second."""
    return f"{column}: requests/s at {clients_text(clients)}"


def times_stock(column: str, clients: int) -> str:
    """Throughput relative to stock, the median over the rounds."""
    return f"{column}: requests/s relative to stock at {clients_text(clients)}"


def next_time(tokens: int, what: str) -> str:
    """`SCHEDULED` or `WHOLE`, LLaVA-NeXT-7B's shape, batch 1."""
    return f"LLaVA-NeXT-7B, {tokens} tokens: {what}"


def next_speedup(tokens: int, what: str) -> str:
    """The unpruned time over that at ``tokens``."""
    return f"LLaVA-NeXT-7B: unpruned over {tokens} tokens, {what}"


def next_memory(tokens: int) -> str:
    """Weights, activations and the KV blocks of one request."""
    return f"LLaVA-NeXT-7B, {tokens} tokens: GPU memory"


def video_time(part: str, what: str) -> str:
    """`SCHEDULED` or `WHOLE`, LLaVA-OneVision-7B's shape, one video."""
    return f"OneVision-7B, video, {part}: {what}"
