# SPDX-License-Identifier: Apache-2.0
"""What `llm-attention` costs under load, beside other selectors and stock vLLM.

Two servers of one model run at the same time; every round gives each column one turn of ``vllm
bench serve`` with 8 clients. Run from the repository root:
``python -m benchmarks.language_attention.cost``.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.measuring.bench import as_turn, bench, random_images, random_text
from benchmarks.measuring.command import stop_servers_on_sigterm
from benchmarks.measuring.folders import MODELS, committed, scratch
from benchmarks.measuring.order import rotated
from benchmarks.measuring.pairs import compare
from benchmarks.measuring.report import machine, say, table
from benchmarks.measuring.servers import stock_and_plugin
from benchmarks.serving.plan import FULL, OUTPUT_TOKENS, STOCK, TEXT, TEXT_TOKENS
from benchmarks.serving.run import ARGUMENTS
from scripts.pages import with_part
from testing.server import Server
from testing.tiny.llava import VISUAL_TOKENS, build_llava

FOLDER: Final = committed("language_attention")
SCRATCH: Final = scratch("language_attention")
BUDGET: Final = 64
CLIENTS: Final = 8
PROMPTS: Final = 8
SELECTORS: Final = ("flashvlm", "flashvlm-2", "llm-attention")
COLUMNS: Final = (STOCK, TEXT, *SELECTORS)
LIMIT: Final = 0.10
"""Selection's share of the prefill that it saves, at most."""


@dataclass(frozen=True)
class Totals:
    """Selection in a worker since its start."""

    seconds: float
    images: float

    def __sub__(self, earlier: "Totals") -> "Totals":
        return Totals(self.seconds - earlier.seconds, self.images - earlier.images)


def selection_totals(url: str, selector: str) -> Totals:
    """Return the time and the number of selections with a selector."""
    with urlopen(f"{url}/metrics", timeout=30) as response:
        page = response.read().decode()
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.labels.get("selector") == selector and sample.name.startswith("flashvlm_selec")
    }
    return Totals(
        found.get("flashvlm_selection_seconds_sum", 0.0),
        found.get("flashvlm_selection_seconds_count", 0.0),
    )


def turn(model: Path, running: Mapping[bool, Server], column: str, seed: int) -> dict[str, float]:
    """Take one turn; return seconds per request, and seconds of selection per image."""
    is_budgeted = column in SELECTORS
    url = running[is_budgeted].url
    tokens = 1 if column == TEXT else OUTPUT_TOKENS
    sent = random_images(TEXT_TOKENS, tokens)
    if column == TEXT:
        sent = random_text(TEXT_TOKENS + VISUAL_TOKENS, tokens)
    before = selection_totals(url, column) if is_budgeted else Totals(0, 0)
    figures = bench(
        url,
        model,
        sent,
        output_tokens=tokens,
        prompts=PROMPTS,
        clients=CLIENTS,
        seed=seed,
        log=SCRATCH / "bench.log",
        budget=BUDGET if is_budgeted else None,
        selector=column if is_budgeted else None,
    )
    found = {
        "seconds": as_turn(figures, tokens).seconds / PROMPTS,
        "ttft": median(as_turn(figures, tokens).ttfts),
    }
    if is_budgeted:
        spent = selection_totals(url, column) - before
        if spent.images != PROMPTS:
            raise RuntimeError(f"{spent.images} selections for {PROMPTS} images")
        found["selection"] = spent.seconds / spent.images
    return found


def measure(rounds: int) -> dict[str, list[dict[str, float]]]:
    """Take all turns; the first of each column is a warm-up."""
    model = build_llava(
        MODELS / f"serving-llava-{FULL.hidden}x{FULL.layers}",
        hidden=FULL.hidden,
        layers=FULL.layers,
    )
    SCRATCH.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, float]]] = {column: [] for column in COLUMNS}
    with stock_and_plugin(model, SCRATCH, ARGUMENTS) as running:
        for round_ in range(rounds + 1):
            for place, column in enumerate(rotated(COLUMNS, round_)):
                one = turn(model, running, column, 1 + round_ * len(COLUMNS) + place)
                say(f"round {round_}/{rounds}, {column}: {1 / one['seconds']:.2f} requests/s")
                if round_:
                    found[column].append(one)
    return found


def saved_share(found: Mapping[str, Sequence[Mapping[str, float]]], selector: str) -> list[float]:
    """Return selection's share of the prefill that the budget saves, round by round."""
    dropped = (VISUAL_TOKENS - BUDGET) / (TEXT_TOKENS + VISUAL_TOKENS)
    return [
        own["selection"] / (prefill["seconds"] * dropped)
        for own, prefill in zip(found[selector], found[TEXT], strict=True)
    ]


def report(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Return the table."""
    stock = [1 / each["seconds"] for each in found[STOCK]]
    rows = []
    for column in (STOCK, *SELECTORS):
        speed = [1 / each["seconds"] for each in found[column]]
        times = [f"{1000 * median(each['ttft'] for each in found[column]):.0f} ms"]
        if column in SELECTORS:
            selection = median(each["selection"] for each in found[column])
            times += [
                f"{1000 * selection:.1f} ms",
                f"{100 * median(saved_share(found, column)):.1f} %",
            ]
        else:
            times += ["", ""]
        rows.append((column, f"{median(speed):.2f}", str(compare(speed, stock)), *times))
    head = (
        f"{BUDGET} tokens, {CLIENTS} clients",
        "requests/s",
        "relative to stock (95 %)",
        "median TTFT",
        "selection per image",
        "share of the prefill saved",
    )
    return table(head, rows)


def main() -> int:
    """Measure; write results and table."""
    parser = argparse.ArgumentParser(prog="benchmarks.language_attention.cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the limit is missed")
    asked = parser.parse_args()
    stop_servers_on_sigterm()
    settings: dict[str, Any] = {**machine(), "rounds": asked.rounds, "prompts": PROMPTS}
    found = measure(asked.rounds)
    (FOLDER / "cost.json").write_text(
        json.dumps({"settings": settings, "turns": found}, indent=1) + "\n"
    )
    page = FOLDER / "README.md"
    page.write_text(with_part(page.read_text(), "cost", report(found)))
    print(report(found))
    share = median(saved_share(found, "llm-attention"))
    if asked.check and share > LIMIT:
        print(f"missed: selection takes {share:.3f} of the prefill saved", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
