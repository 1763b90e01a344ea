# SPDX-License-Identifier: Apache-2.0
"""Tables and targets, from formulas and measured latencies."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.efficiency import formulas, paper
from benchmarks.efficiency.formulas import LLAMA_7B, MIB, TERA, Shape
from benchmarks.measuring.pairs import Compared, compare
from benchmarks.measuring.report import Mark, table

HALF: Final = 2  # bytes of a value
VLLM: Final = "vLLM"
TRANSFORMERS: Final = "Transformers, layer by layer"
OWN_FORWARD: Final = "Transformers, its own forward"


@dataclass(frozen=True)
class Way:
    """A configuration that is timed."""

    engine: str
    method: str
    budget: int | None = None

    @property
    def name(self) -> str:
        """Its name in JSON."""
        return f"{self.engine}: {self.method}" + (f" {self.budget}" if self.budget else "")

    @property
    def unpruned(self) -> "Way":
        """The configuration that it is compared with: all tokens kept, by the same code."""
        return Way(self.engine, paper.UNPRUNED)


WAYS: Final = (
    Way(VLLM, paper.UNPRUNED),
    *(Way(VLLM, method, n) for n in paper.BUDGETS for method in ("vispruner", "flashvlm")),
    Way(OWN_FORWARD, paper.UNPRUNED),
    Way(TRANSFORMERS, paper.UNPRUNED),
    *(Way(TRANSFORMERS, "fastv", n) for n in paper.BUDGETS),
)


def tokens_by_layer(shape: Shape, method: str, full: int, budget: int | None) -> list[int]:
    """Return the visual tokens that each layer of the language model processes."""
    if budget is None:
        return formulas.everywhere(shape, full)
    if method == "fastv":
        return formulas.fastv(shape, full, budget)
    return formulas.everywhere(shape, budget)


def formula_table(on_gpu: "Latencies | None") -> str:
    """Return the paper's table next to the formulas, and next to our latencies on a GPU.

    Without one, what was measured elsewhere is in ``benchmarks/gpu``.
    """
    unpruned = paper.ROWS[paper.UNPRUNED, paper.FULL_TOKENS]
    words = formulas.words_that_explain(unpruned.tflops * TERA, paper.FULL_TOKENS)
    head = (
        "method", "tokens", "FLOPs (T): visual tokens", "with the tower", f"with {words} words",
        "paper", "KV (MiB)", "paper (MB)", "GPU memory, paper (GB)", "latency, paper (ms)",
        *(() if on_gpu is None else ("latency, ours",)),
    )  # fmt: skip
    rows = []
    for (method, tokens), row in paper.ROWS.items():
        budget = None if method == paper.UNPRUNED else tokens
        counts = tokens_by_layer(LLAMA_7B, method, paper.FULL_TOKENS, budget)
        flops = LLAMA_7B.flops(counts)
        with_words = LLAMA_7B.flops([count + words for count in counts])
        way = Way(TRANSFORMERS if method == "fastv" else VLLM, method, budget)
        rows.append(
            (
                method,
                tokens,
                f"{flops / TERA:.1f}",
                f"{(flops + formulas.tower_flops()) / TERA:.1f}",
                f"{with_words / TERA:.1f}",
                row.tflops,
                f"{LLAMA_7B.kv_bytes(counts, HALF) / MIB:.0f}",
                f"{row.kv_mb:.0f}",
                row.memory_gb,
                f"{row.latency_ms:.0f}",
                *(() if on_gpu is None else (f"{on_gpu.median(way):.0f} ms",)),
            )
        )
    return table(head, rows)


@dataclass(frozen=True)
class Latencies:
    """Milliseconds until the first token, a round after another, of one model."""

    shape: Shape
    value_bytes: int
    tokens: Mapping[Way, int]
    """Visual tokens that reach the language model, as counted when it ran."""
    rounds: Mapping[Way, Sequence[float]]

    def median(self, way: Way) -> float:
        """The latency to quote."""
        return statistics.median(self.rounds[way])

    def share(self, way: Way) -> Compared:
        """Return the latency relative to the same code without pruning, round by round."""
        return compare(self.rounds[way], self.rounds[way.unpruned])

    def counts(self, way: Way) -> list[int]:
        """Visual tokens by layer."""
        full = self.tokens[way.unpruned]
        return tokens_by_layer(self.shape, way.method, full, way.budget)


def latency_table(found: Latencies) -> str:
    """Return what was measured here, with the paper's shares next to ours."""
    head = (
        "engine", "method", "visual tokens", "FLOPs (G)", "KV (MiB)", "latency p50, ms",
        "share of unpruned (95 %)", "paper's share",
    )  # fmt: skip
    rows = []
    for way in found.rounds:
        counts = found.counts(way)
        rows.append(
            (
                way.engine,
                way.method,
                way.budget or counts[0],
                f"{found.shape.flops(counts) / 1e9:.1f}",
                f"{found.shape.kv_bytes(counts, found.value_bytes) / MIB:.1f}",
                f"{found.median(way):.0f}",
                "1" if way.budget is None else found.share(way),
                "1" if way.budget is None else f"{paper.latency_share(way.method, way.budget):.2f}",
            )
        )
    return table(head, rows)


def marks(found: Latencies) -> list[Mark]:
    """Judge: our share of the unpruned latency is the paper's or less, and less than FastV's."""
    judged = []
    for budget in paper.BUDGETS:
        ours = found.share(Way(VLLM, "flashvlm", budget))
        theirs = found.share(Way(TRANSFORMERS, "fastv", budget))
        asked = paper.latency_share("flashvlm", budget)
        judged.append(
            Mark(
                f"flashvlm, {budget} tokens: at most the paper's {asked:.2f} of unpruned latency",
                str(ours),
                None if ours.interval is None else ours.interval[1] <= asked,
            )
        )
        judged.append(
            Mark(
                f"{budget} tokens: flashvlm leaves a smaller share of its engine's latency than "
                "FastV of its own",
                f"{ours} and {theirs}",
                None
                if ours.interval is None or theirs.interval is None
                else ours.interval[1] < theirs.interval[0],
            )
        )
    return judged
