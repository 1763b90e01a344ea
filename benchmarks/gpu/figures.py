# SPDX-License-Identifier: Apache-2.0
"""Names of the figures that marks, pages and more than one step refer to."""

from __future__ import annotations

from typing import Final

BUDGETS: Final = (128, 64, 32)
CLIENTS: Final = (1, 8, 32)
STOCK: Final = "stock"
NONE: Final = "no budget"
COLUMNS: Final = (STOCK, NONE, *(str(budget) for budget in BUDGETS))

GPU_TESTS: Final = "tests/gpu pass"
SELECTION_ONE: Final = "selection 576 -> 64, batch 1"
SELECTION_32: Final = "selection 576 -> 64, batch 32"
SELECTION_CROPS: Final = "selection 2880 -> 640, five crops"
SELECTION_LIST: Final = "selection 2880 -> 640, one list"
NO_SYNC: Final = "the selection never waits for the GPU"
PUBLISHED: Final = "published loop 576 -> 64"
VISPRUNER: Final = "VisPruner 576 -> 64"

LATENCY_SHARE: Final = "LLaVA-NeXT-7B: unpruned over 160 tokens, scheduled to first token"
LATENCY_WHOLE: Final = "LLaVA-NeXT-7B: unpruned over 160 tokens, whole request"
SECOND_TTFT: Final = "second question: TTFT as share of the first's"
SECOND_ENCODED: Final = "second question: images encoded again"


def tower_share(images: int) -> str:
    """Selection as a share of a CLIP-L/336 tower's time."""
    return f"selection as share of the CLIP-L/336 tower, batch {images}"


def counts_exact(engine: str) -> str:
    """Every request got the number of visual tokens that it asked for."""
    return f"{engine}: counts exact for none, 128, 64, 32"


def mixed_exact(engine: str) -> str:
    """The same, in one batch of all budgets."""
    return f"{engine}: counts exact with budgets mixed in one batch"


def prefix_cache(engine: str) -> str:
    """The same question hits the prefix cache, another one gets its own answer."""
    return f"{engine}: prefix cache with two questions"


def runner_seen(engine: str) -> str:
    """The worker ran the model runner that was asked for."""
    return f"{engine}: model runner"


def accuracy(engine: str, budget: int | None) -> str:
    """Share of right answers."""
    return f"{engine}: right answers, {'no budget' if budget is None else f'{budget} tokens'}"


def accuracy_as_cpu(engine: str) -> str:
    """All of its accuracies lie in the intervals of the CPU's."""
    return f"{engine}: accuracy within the CPU's 95 % intervals"


def equals_stock(engine: str) -> str:
    """Without a budget, ids and log-probabilities are those of a run without the plugin."""
    return f"{engine}: no budget gives stock's ids and log-probabilities"


def chunked(engine: str) -> str:
    """Prompts in chunks shorter than an image give the answers of whole ones."""
    return f"{engine}: chunked prefill gives the same answers"


def throughput(column: str, clients: int) -> str:
    """Requests per second."""
    return f"{column}: requests/s at {clients} client{'s' if clients > 1 else ''}"


def times_stock(column: str, clients: int) -> str:
    """Throughput as a multiple of stock's, the median over the rounds."""
    return f"{column}: times stock's requests/s at {clients} client{'s' if clients > 1 else ''}"


def next_latency(tokens: int) -> str:
    """LLaVA-NeXT-7B's shape, batch 1."""
    return f"LLaVA-NeXT-7B, {tokens} tokens: scheduled to first token"


def next_whole(tokens: int) -> str:
    """The same with everything that happens in the API process."""
    return f"LLaVA-NeXT-7B, {tokens} tokens: whole request"


def next_memory(tokens: int) -> str:
    """Weights, activations and the KV blocks of this one request."""
    return f"LLaVA-NeXT-7B, {tokens} tokens: GPU memory"
