# SPDX-License-Identifier: Apache-2.0
"""Selectors, saliency and choices in blocks on large images, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measuring.report import table
from benchmarks.selection import large_tower
from benchmarks.selection.answers import Answers
from benchmarks.selection.in_blocks import InBlocks
from benchmarks.selection.large_tower import Rates
from benchmarks.selection.sampled import SELECTORS, Agreement, SaliencyTime
from benchmarks.selection.selectors import KEPT, MARKS, RANGES, WIDTH, Cost, Quantity, exponents
from flashvlm_vllm.vision.attention import MOST_QUERIES, SAMPLED


def selectors_table(costs: Sequence[Cost], rates: Rates) -> str:
    """Time, memory and share of the tower of every selector at every size."""
    counts = sorted({cost.tokens for cost in costs})
    rows = [
        [
            "vision tower (computed)",
            *(f"{rates.tower_ms(count) / 1e3:,.0f} s" for count in counts),
        ]
    ]
    for name in dict.fromkeys(cost.selector for cost in costs):
        by_count = {cost.tokens: cost for cost in costs if cost.selector == name}
        rows.append([name, *(_cost(by_count[count], rates) for count in counts)])
    caption = (
        f"Every built-in selector on one image of N tokens, {WIDTH} wide, N/{KEPT} kept: time, "
        "peak memory of temporary tensors, time as a share of the vision tower that makes the "
        "tokens. Selectors are measured at every size. The tower is **computed**, not run: one "
        f"layer's parts were measured at {large_tower.MEASURED:,} patches (float32, "
        f"{large_tower.PATCHES} patches a token; linear parts {rates.linear_ms:,.0f} ms, attention "
        f"within windows of {large_tower.WINDOW} patches {rates.window_ms:.0f} ms, over all "
        f"patches {rates.full_ms:,.0f} ms), the first two scaled with the patches and the last "
        f"with their square, for {large_tower.LAYERS} layers of which {large_tower.FULL} have "
        "full attention."
    )
    return f"{caption}\n\n" + table(["", *(f"N = {count:,}" for count in counts)], rows)


def _cost(cost: Cost, rates: Rates) -> str:
    share = cost.ms / rates.tower_ms(cost.tokens)
    ms = f"{cost.ms:.{2 if cost.ms < 1 else 1 if cost.ms < 100 else 0}f}"
    return f"{ms} ms, {cost.peak_mib:.1f} MiB, {share:.3%}"


def selector_exponents_table(costs: Sequence[Cost]) -> str:
    """Return the exponents of time and memory of every selector, in every range."""
    columns: list[tuple[Quantity, tuple[int, int]]] = [(q, ends) for q in MARKS for ends in RANGES]
    found = [exponents(costs, quantity, ends) for quantity, ends in columns]
    head = ["exponent of", *(f"{q}, {first:,} to {last:,}" for q, (first, last) in columns)]
    names = dict.fromkeys(cost.selector for cost in costs)
    return table(head, [[name, *(f"{each[name]:.2f}" for each in found)] for name in names])


def saliency_times_table(times: Sequence[SaliencyTime], rates: Rates) -> str:
    """Return the time of the saliency, compared with the attention of its layer."""
    caption = (
        f"Saliency of one image (`received_attention`, {large_tower.HEADS} heads of "
        f"{large_tower.WIDTH // large_tower.HEADS}), of all queries up to {MOST_QUERIES:,} "
        f"patches and of {SAMPLED:,} beyond. The time of the layer's own attention is computed "
        f"from that at {large_tower.MEASURED:,} patches, and that of the tower as above."
    )
    rows = [
        [
            f"{each.patches:,}",
            f"{each.ms:,.0f} ms",
            f"{each.attention_ms:,.0f} ms",
            f"{each.ms / each.attention_ms:.0%}",
            f"{each.ms / rates.tower_ms(each.patches // large_tower.PATCHES):.2%}",
        ]
        for each in times
    ]
    head = ["patches", "saliency", "attention of that layer", "share", "share of the tower"]
    return f"{caption}\n\n" + table(head, rows)


def agreement_table(agreements: Sequence[Agreement]) -> str:
    """Return the effect of the sample, compared with the effect of rounding."""
    rows = [
        [
            each.source,
            f"{each.tokens:,}",
            f"{each.correlation:.5f}",
            f"{each.best_shared:.1%}",
            *(
                f"{each.kept_shared[name]:.1%} ({each.kept_shared_rounded[name]:.1%})"
                for name in SELECTORS
            ),
        ]
        for each in agreements
    ]
    head = ["attention", "tokens", "correlation", f"best 1/{KEPT} shared"]
    caption = (
        f"Saliency from {SAMPLED:,} queries against that from all queries: correlation, the best "
        "tokens in common, and the kept tokens in common by selector. In brackets: kept tokens in "
        "common where only rounding differs (all queries, in float64 against float32)."
    )
    return f"{caption}\n\n" + table([*head, *(f"kept by {name}" for name in SELECTORS)], rows)


def in_blocks_table(results: Sequence[InBlocks]) -> str:
    """Return the quality of selection in blocks."""
    rows = [
        [
            each.selector,
            f"{each.tokens:,}",
            each.goal,
            *(f"{value:.4g}" for value in (each.chance, each.reached, each.exact)),
            f"{each.share:.1%}",
            f"{each.kept_shared:.0%}",
            f"{each.exact_ms:,.0f} → {each.ms:,.0f} ms",
        ]
        for each in results
    ]
    head = [
        f"1/{KEPT} kept",
        "tokens",
        "goal",
        "at random",
        "in blocks",
        "all pairs",
        "share of the way",
        "kept tokens in common",
        "time: all pairs → in blocks",
    ]
    return table(head, rows)


def answers_table(results: Sequence[Answers]) -> str:
    """Return the effect of selection in blocks on answers."""
    rows = [
        [
            each.selector,
            f"{each.budget}",
            f"{each.right_all_pairs / each.questions:.1%}",
            f"{each.right_in_blocks / each.questions:.1%}",
            f"{100 * each.difference.value:+.1f} points ({100 * each.difference.low:+.1f} to "
            f"{100 * each.difference.high:+.1f})",
            f"{each.only_in_blocks} and {each.only_all_pairs}",
            f"{each.p:.2f}",
        ]
        for each in results
    ]
    head = [
        f"small VLM, {results[0].questions} questions",
        "budget",
        "all pairs",
        "in blocks",
        "paired difference (95 %)",
        "right only in blocks, only with all pairs",
        "McNemar's p",
    ]
    return table(head, rows)
