# SPDX-License-Identifier: Apache-2.0
"""The demo's output: a line per step with the time, and the table of costs."""

import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median

from demo.conversation import Turn
from demo.measure import Answer

HEADINGS = ("budget", "prompt tokens", "visual tokens kept", "KV blocks", "TTFT ms", "answer")
ANSWER_WIDTH = 36
CONVERSATION_LEGEND = """\
computed   prompt tokens that were not in vLLM's prefix cache. Each turn repeats the earlier
           ones and brings a new picture. Earlier pictures keep the tokens that their own
           question selected (visual_steering "message", the default), so their KV blocks
           are found again
no budget  served as by stock vLLM, with its prefix cache"""


class Progress:
    """Prints lines that begin with the seconds since the start."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """Print one line."""
        print(f"[{self.seconds:5.1f} s] {text}", flush=True)

    @contextmanager
    def waiting(self, text: str, every: float = 10.0) -> Iterator[None]:
        """Print ``text``, and a reminder at intervals."""
        self.say(text)
        over = threading.Event()

        def remind() -> None:
            while not over.wait(every):
                self.say("  still waiting ...")

        thread = threading.Thread(target=remind, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def table(answers: Mapping[int | None, Sequence[Answer]]) -> str:
    """Rows of aligned columns: per budget the first answer, with the median TTFT of all."""
    rows = [HEADINGS]
    for budget, repeated in answers.items():
        first = repeated[0]
        rows.append(
            (
                "none" if budget is None else str(budget),
                str(first.prompt_tokens),
                f"{first.kept_tokens} of {first.visual_tokens}",
                str(max(answer.kv_blocks for answer in repeated)),
                f"{median(answer.ttft_ms for answer in repeated):.0f}",
                textwrap.shorten(first.text, ANSWER_WIDTH, placeholder=" ..."),
            )
        )
    return _aligned(rows, text_last=True)


def conversation_table(conversations: Mapping[int | None, Sequence[Turn]]) -> str:
    """Rows of aligned columns: per budget the tokens computed in each turn, in all, and prompts."""
    turns = range(1, 1 + max(map(len, conversations.values())))
    names = (f"computed in turn {turn}" for turn in turns)
    rows = [("budget", *names, "in all", "last prompt")]
    for budget, own in conversations.items():
        computed = [turn.computed for turn in own]
        name = "none" if budget is None else str(budget)
        rows.append((name, *map(str, computed), str(sum(computed)), str(own[-1].prompt)))
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]], *, text_last: bool = False) -> str:
    """Align cells to the right, except those of the last column if it is text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        if text_last:
            cells[-1] = row[-1]
        lines.append("  ".join(cells))
    return "\n".join(lines)
