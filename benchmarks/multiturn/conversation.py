# SPDX-License-Identifier: Apache-2.0
"""A conversation with a new picture in every turn: prompt tokens computed, and TTFT, by turn.

Stock vLLM and the plugin take turns, both with their prefix caches. Run from the repository root:
``python -m benchmarks.multiturn.conversation --check``.
"""

import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.measuring.ask import ask, user
from benchmarks.measuring.command import command_line, stop_servers_on_sigterm
from benchmarks.measuring.folders import MODELS, committed, scratch
from benchmarks.measuring.order import rotated
from benchmarks.measuring.pictures import picture
from benchmarks.measuring.report import Mark, machine, marks_table, missed, say, table
from benchmarks.measuring.servers import MODEL_NAME, stock_and_plugin
from scripts.pages import with_part
from testing.photo import data_url
from testing.tiny.llava import build_llava

SCRATCH: Final = scratch("multiturn")
FILE: Final = committed("multiturn") / "conversation.json"
TURNS: Final = 30
ANSWER_TOKENS: Final = 8
BLOCK: Final = 32
"""Tokens of a KV block. What is computed may differ by one block from turn to turn."""
STOCK: Final = "stock"
COLUMNS: Final[dict[str, dict[str, Any]]] = {
    STOCK: {},
    "64, by message": {"visual_budget": 64, "visual_steering": "message"},
    "128, by message": {"visual_budget": 128, "visual_steering": "message"},
    "64, latest": {"visual_budget": 64, "visual_steering": "latest"},
    "128, latest": {"visual_budget": 128, "visual_steering": "latest"},
}
SHARES: Final = {"64, by message": 0.3, "128, by message": 0.5}
"""Of the prompt tokens that stock computes, all turns together: the most."""
CONTEXT: Final = 24_576
ARGUMENTS: Final = (
    *("--max-model-len", str(CONTEXT), "--block-size", str(BLOCK)),
    *("--enable-prompt-tokens-details", "--limit-mm-per-prompt", json.dumps({"image": TURNS + 1})),
    *("--hf-overrides", json.dumps({"text_config": {"max_position_embeddings": CONTEXT}})),
)


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of a conversation."""

    computed: int
    """Prompt tokens that were not in the prefix cache."""
    prompt: int
    """All prompt tokens."""
    ttft: float
    """Seconds."""


def conversation(url: str, fields: Mapping[str, Any], first: int, turns: int) -> list[Turn]:
    """Have one conversation; its pictures are those from number ``first`` on."""
    messages: list[dict[str, Any]] = []
    found = []
    for number in range(turns):
        image = data_url(picture(first + number))
        messages.append(user(f"What is in picture {number + 1}?", image))
        reply = ask(url, MODEL_NAME, messages, ANSWER_TOKENS, **fields)
        messages.append({"role": "assistant", "content": reply.text})
        found.append(Turn(reply.computed_tokens, reply.prompt_tokens, reply.ttft))
    return found


def measure(rounds: int, turns: int) -> dict[str, list[list[Turn]]]:
    """Return the conversations of each column, one per round."""
    model = build_llava(MODELS / "multiturn-llava-512x8", vision_hidden=512, vision_layers=8)
    found: dict[str, list[list[Turn]]] = {column: [] for column in COLUMNS}
    with stock_and_plugin(model, SCRATCH, ARGUMENTS, "conversation-") as servers:
        first = 1000
        for column, fields in COLUMNS.items():  # warm-up
            conversation(servers[column != STOCK].url, fields, first, 2)
        for round_ in range(rounds):
            for column in rotated(tuple(COLUMNS), round_):
                first += turns
                url = servers[column != STOCK].url
                own = conversation(url, COLUMNS[column], first, turns)
                found[column].append(own)
                say(f"round {round_ + 1}, {column}: {sum(each.computed for each in own)} computed")
    return found


def computed(conversations: Sequence[Sequence[Turn]]) -> list[float]:
    """Return the median of the tokens computed in each turn."""
    return [
        statistics.median(each.computed for each in turns)
        for turns in zip(*conversations, strict=True)
    ]


def report(found: Mapping[str, Sequence[Sequence[Turn]]]) -> str:
    """Return the table as Markdown, and the targets."""
    stock = sum(computed(found[STOCK]))
    rows = []
    for column, conversations in found.items():
        own = computed(conversations)
        half = len(own) // 2
        ttfts = [
            statistics.median(turn.ttft for each in conversations for turn in each[part])
            for part in (slice(0, 1), slice(1, half), slice(half, None))
        ]
        rows.append(
            [
                column,
                f"{sum(own):,.0f}",
                f"{sum(own) / stock:.2f}",
                f"{own[1]:.0f}, {own[half]:.0f}, {own[-1]:.0f}",
                ", ".join(f"{1000 * each:.0f}" for each in ttfts),
            ]
        )
    head = (
        "requests",
        "prompt tokens computed",
        "of stock's",
        "in turns 2, middle, last",
        "TTFT of turn 1, first half, second half, ms",
    )
    return "\n\n".join([table(head, rows), marks_table(marks(found))])


def marks(found: Mapping[str, Sequence[Sequence[Turn]]]) -> list[Mark]:
    """Judge tokens by turn and in all, and the TTFT of later turns."""
    stock = computed(found[STOCK])
    judged = []
    for column, share in SHARES.items():
        own = computed(found[column])
        over = [
            turn for turn, (a, b) in enumerate(zip(own, stock, strict=True), 1) if a > b + BLOCK
        ]
        judged.append(
            Mark(
                f"{column}: computes at most what stock does in every turn",
                f"more in turns {over}" if over else "in none of them more",
                not over,
            )
        )
        ratio = sum(own) / sum(stock)
        judged.append(Mark(f"{column}: at most {share} in all", f"{ratio:.3f}", ratio <= share))
        later = [
            statistics.median(turn.ttft for each in found[name] for turn in each[1:])
            for name in (column, STOCK)
        ]
        judged.append(
            Mark(
                f"{column}: median TTFT of later turns at most stock's",
                f"{1000 * later[0]:.0f} of {1000 * later[1]:.0f} ms",
                later[0] <= later[1],
            )
        )
    return judged


def read(file: Path = FILE) -> dict[str, list[list[Turn]]]:
    """Return the conversations of a results file."""
    stored = json.loads(file.read_text())["conversations"]
    return {
        column: [[Turn(**turn) for turn in each] for each in own] for column, own in stored.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; write ``conversation.json`` and print the table."""
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=TURNS)
    asked = parser.parse_args(arguments)
    stop_servers_on_sigterm()
    settings = {**machine(), "rounds": asked.rounds, "turns": asked.turns}
    found = measure(asked.rounds, asked.turns)
    file = (asked.output or committed("multiturn")) / "conversation.json"
    conversations = {
        column: [[dataclasses.asdict(turn) for turn in each] for each in own]
        for column, own in found.items()
    }
    file.write_text(json.dumps({"settings": settings, "conversations": conversations}) + "\n")
    text = report(found)
    print(text)
    if asked.output is None:
        page = committed("multiturn") / "README.md"
        page.write_text(with_part(page.read_text(), "conversation", text))
    return 1 if missed(marks(found)) and asked.check else 0


if __name__ == "__main__":
    sys.exit(main())
